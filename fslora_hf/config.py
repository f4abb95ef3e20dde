"""The configuration of a federated run: TRL's `SFTConfig`, and what a federation adds to it."""

import math
import os
from collections.abc import Iterator, Set
from dataclasses import dataclass, field, fields
from typing import Any

from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames
from trl import SFTConfig

from .evaluation.results import PROTOCOLS
from .methods import METHODS as METHOD_CLASSES
from .methods import Method, MethodError, method_class
from .settings import SettingsError, default_of, did_you_mean, field_problems, is_a, sentence

METHODS = tuple(METHOD_CLASSES)
RANK_DISTRIBUTIONS = ("homogeneous", "uniform", "normal", "heavy_tail_low")
EVAL_PROTOCOLS = (*PROTOCOLS, "loss")
SERVER_OPTIMIZERS = ("sgd", "sgd_momentum", "adam", "adamw")

AUTO = "auto"  # per_device_train_clients: as many as fit

# Clients of a block lie side by side in one stacked tensor, so a local optimizer must treat each number for itself.
LOCAL_OPTIMIZERS = (
    "adamw_torch",
    "adamw_torch_fused",
    "sgd",
    "adagrad",
    "rmsprop",
    "lion_32bit",
    "rmsprop_bnb",
    "rmsprop_bnb_32bit",
    "ademamix",
)
# Why the others cannot be used, by a part of their name; the first that fits counts.
_WHY_NOT = {
    "galore": "it projects whole matrices, in which clients lie side by side",
    "apollo": "it projects whole matrices, in which clients lie side by side",
    "8bit": "its state is quantized in blocks that mix clients",
    "4bit": "its state is quantized in blocks that mix clients",
    "paged": "its pages are never freed, and every client starts with a new state",
    "adafactor": "its row and column statistics mix clients",
    "lomo": "it updates inside the backward pass, before gradients are clipped for each client",
    "stable": "it scales the step by a mean over the whole tensor, which mixes clients",
    "grok": "it clips the gradients of several clients together",
    "schedule_free": "its weights live in its state, which ends with a client's turn",
    "": "it needs hardware or a package that this trainer has not been tried with",
}

_ROUND_ENDS = "checkpoints are written at round ends, so remove it and set save_rounds"
_EVALUATION = "evaluations run at round ends, so remove it and set eval_rounds"
_LENGTH = "num_rounds and local_steps say how long a run is, so remove it and set those"
_WHOLE_COPY = "each process trains its own clients on a whole copy of the model, so leave it out"
_OWN_ROW = "every example belongs to one client and keeps a row of its own, so remove it"
_PLAN = "the plan of a round says which examples a step sees and in which order, so remove it"
_ADAPTER_DTYPE = "it would round the global adapter itself, so remove it"
# Settings whose default is the only value that works, and what to do instead.
_REFUSED = {
    "save_strategy": _ROUND_ENDS,
    "save_steps": _ROUND_ENDS,
    "enable_jit_checkpoint": "it would save in the middle of a round, so remove it and set save_rounds",
    "save_only_model": "a run resumes from the server's state beside the model, so remove it",
    "eval_strategy": _EVALUATION,
    "eval_steps": _EVALUATION,
    "eval_delay": _EVALUATION,
    "num_train_epochs": _LENGTH,
    "max_steps": _LENGTH,
    "hub_strategy": "rounds are pushed, each whole, so remove it and set push_rounds",
    "hub_always_push": "every chosen round is pushed, whatever is under way, so remove it",
    "load_best_model_at_end": "a run ends with its last round, so remove it and load the checkpoint of another round",
    "ignore_data_skip": _PLAN,
    "train_sampling_strategy": _PLAN,
    "shuffle_dataset": _PLAN,
    "dataloader_in_order": _PLAN,
    "restore_callback_states_from_checkpoint": "what a round end leaves is in its own state file, so remove it",
    "fp16": "one client's overflow would skip the step of all others, so use bf16 or neither",
    "bf16_full_eval": _ADAPTER_DTYPE,
    "fp16_full_eval": _ADAPTER_DTYPE,
    "fsdp": _WHOLE_COPY,
    "deepspeed": _WHOLE_COPY,
    "parallelism_config": _WHOLE_COPY,
    "auto_find_batch_size": "batches are planned ahead, so remove it and lower per_device_train_batch_size",
    "packing": _OWN_ROW,
    "eval_packing": _OWN_ROW,
    "padding_free": _OWN_ROW,
    "label_smoothing_factor": "the loss is computed from the labels' log-probabilities alone, so remove it",
    "optim_target_modules": "it belongs to optimizers that mix clients, so remove it",
    "truncation_mode": "long rows are shortened with their answer kept, so remove it and see overlong_prompts",
    "router_aux_loss_coef": "the auxiliary loss of a batch mixes its clients, so remove it or set it to 0.0",
}
# What `accelerate launch` asks for through the environment.
_LAUNCHERS = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism_config",
}
_NOT_OF_THE_ROUND = ("reduce_lr_on_plateau", "greedy")
_SCHEDULES = tuple(each.value for each in SchedulerType if each.value not in _NOT_OF_THE_ROUND)
_NO_ROUTER_LOSS = ("router_aux_loss_coef", 0.0)  # the value that turns it off; None leaves it to the model
_AT_LEAST = {
    **dict.fromkeys(("num_rounds", "clients_per_round", "local_steps", "per_device_train_clients", "min_examples"), 1),
    **dict.fromkeys(("min_rank", "max_rank", "per_device_train_batch_size", "per_device_eval_batch_size"), 1),
    **dict.fromkeys(("gradient_accumulation_steps", "eval_num_beams", "eval_max_new_tokens"), 1),
    "max_length": 2,  # the shift takes the first token from the loss
    **dict.fromkeys(("save_rounds", "eval_rounds", "push_rounds"), 0),
    **dict.fromkeys(("seed", "learning_rate", "warmup_steps"), 0),
    **dict.fromkeys(("weight_decay", "max_grad_norm"), 0),
}


@dataclass
class FederatedSketchConfig(SFTConfig):
    """What `FederatedSketchTrainer` needs to know: every field of TRL's `SFTConfig`, and those of a federation.

    A run is `num_rounds` rounds. In each, `clients_per_round` clients take `local_steps` optimizer steps on
    `per_device_train_batch_size * gradient_accumulation_steps` of their own examples; the server then averages what
    they changed. `learning_rate`, its schedule and `warmup_steps` count rounds; `seed` fixes all that is drawn. The
    defaults are the algorithm of W. Fang et al., "Federated Sketching LoRA", arXiv 2501.19389.

    Other defaults than `SFTConfig`'s: `save_strategy` is `no` (see `save_rounds`), `average_tokens_across_devices` is
    False, and `activation_checkpointing` is on unless turned off, without the warning about its former name.

    Raises:
        SettingsError: a ValueError with one line for each setting that cannot work.
    """

    num_rounds: int = field(default=100, metadata={"help": "Number of rounds of the run."})
    clients_per_round: int | None = field(
        default=None, metadata={"help": "Number of clients that take part in a round. None: all of them."}
    )
    local_steps: int = field(default=20, metadata={"help": "Optimizer steps each client takes in a round."})
    # None, which is refused, makes the command line read this field as text.
    per_device_train_clients: int | str | None = field(
        default=1,
        metadata={
            "help": "Clients a process trains in the same step: a number, or `auto` for as many as fit into its "
            "memory, which is measured before the first round. Changes speed and memory; of the result only rounding "
            "and which numbers dropout draws."
        },
    )
    method: str = field(
        default="fslora",
        metadata={
            "help": "What clients receive and how it is averaged: random sketches (fslora), the whole adapter "
            "(fedit), its first rows weighted by norm (hetlora), the best part of averaged products (flexlora), B "
            "alone (ffa_lora), or new adapters that are stacked and folded into the base (flora) or kept beside it "
            "(flora_residual); or a class in a file of your own, as module:Class.",
            "metavar": f"{{{','.join(METHODS)},MODULE:CLASS}}",
        },
    )
    client_id_column: str = field(
        default="client_id", metadata={"help": "Integer column of the training data that says whose a row is."}
    )
    min_examples: int = field(
        default=1, metadata={"help": "Fewest examples a client may be left with once the data is prepared."}
    )
    client_ranks: list[int] | None = field(
        default=None,
        metadata={"help": "Rank of each client, the i-th for the i-th smallest id. Instead of rank_distribution."},
    )
    rank_distribution: str = field(
        default="homogeneous",
        metadata={"help": "Law that client ranks are drawn by, once for a run.", "choices": RANK_DISTRIBUTIONS},
    )
    min_rank: int | None = field(
        default=None,
        metadata={"help": "Least rank of a client. None: 1, and max_rank for the homogeneous law."},
    )
    max_rank: int | None = field(
        default=None, metadata={"help": "Greatest rank of a client. None: the rank of the global adapter."}
    )
    sketch_scope: str = field(
        default="module",
        metadata={
            "help": "Whether a client's sketch is drawn for each module or once for the model.",
            "choices": ("module", "model"),
        },
    )
    server_optim: str = field(
        default="sgd",
        metadata={
            "help": "Optimizer the server applies to the negative average update: torch's, without weight decay. "
            "sgd at rate 1 is plain averaging.",
            "choices": SERVER_OPTIMIZERS,
        },
    )
    server_learning_rate: float | None = field(
        default=None, metadata={"help": "Rate of the server. None: 1.0 for sgd and sgd_momentum, else 0.001."}
    )
    client_weighting: str = field(
        default="uniform",
        metadata={
            "help": "Weights of the average: all alike, or in proportion to the clients' examples.",
            "choices": ("uniform", "num_examples"),
        },
    )
    upload_top_k: float | None = field(
        default=None,
        metadata={
            "help": "Share of its update that a client sends, such as 0.1: the numbers that are largest in size, and "
            "their places. None: all."
        },
    )
    error_feedback: bool = field(
        default=False,
        metadata={
            "help": "With upload_top_k, a client keeps what it does not send and adds it to its next update. Not with "
            "methods that learn in new directions each round."
        },
    )
    upload_budget: float | None = field(
        default=None,
        metadata={
            "help": "End the run after the round in which all uploads together reach so many megabytes (10**6 bytes). "
            "None: after num_rounds, which is the most in any case."
        },
    )
    save_rounds: int = field(
        default=10, metadata={"help": "Write a checkpoint every so many rounds and after the last. 0: never."}
    )
    eval_rounds: int = field(
        default=0, metadata={"help": "Evaluate every so many rounds and after the last. 0: never."}
    )
    eval_protocol: str | None = field(
        default=None,
        metadata={
            "help": "How an evaluation asks rows with options: loglikelihood scores each, generate reads the answer "
            "from a text, loss asks nothing. None: loglikelihood where the rows have options, else loss.",
            "choices": EVAL_PROTOCOLS,
        },
    )
    eval_num_beams: int = field(default=4, metadata={"help": "Beams of eval_protocol generate. 1: greedy."})
    eval_max_new_tokens: int = field(
        default=32, metadata={"help": "Tokens that eval_protocol generate writes at most."}
    )
    overlong_prompts: str = field(
        default="truncate",
        metadata={
            "help": "Rows longer than max_length: truncate cuts the prompt from the left, drop leaves the row out.",
            "choices": ("truncate", "drop"),
        },
    )

    push_rounds: int = field(
        default=10,
        metadata={
            "help": "With push_to_hub, push every so many rounds and after the last, each as a commit with a tag such "
            "as round-0010. 0: the last alone."
        },
    )
    push_resume_state: bool = field(
        default=False,
        metadata={"help": "Push what a run is resumed from beside each round (resume_from_checkpoint hub)."},
    )
    push_eval_results: bool = field(
        default=True, metadata={"help": "Push the result files of evaluated rounds, into results/ of the repository."}
    )
    push_eval_yaml: bool = field(
        default=False, metadata={"help": "Push scores as .eval_results/*.yaml, too, which registered benchmarks show."}
    )
    hub_deadline: float = field(
        default=600.0,
        metadata={"help": "Seconds for the push of a round, after which it is given up and tried later."},
    )

    save_strategy: str = field(default="no", metadata={"help": "Not used: see save_rounds."})
    eval_strategy: str = field(default="no", metadata={"help": "Not used: see eval_rounds."})
    average_tokens_across_devices: bool = field(
        default=False, metadata={"help": "Not used: each client's loss is the mean over its own tokens."}
    )
    # SFTConfig turns checkpointing on by this deprecated name, which warns every user who left it alone.
    gradient_checkpointing: bool | None = field(
        default=None,
        metadata={"help": "Deprecated name of activation_checkpointing.", "nargs": "?", "const": True},
    )

    def __post_init__(self):
        self._normalise()
        problems = field_problems(self, besides={"resume_from_checkpoint"}) | self._wrong_values() | self._refusals()
        sentences = [*problems.values(), *self._contradictions(problems.keys())]
        sentences += self._method_contradictions(problems.keys())
        launcher = self._launcher_problems()
        # The classes above check the rest, and must not stumble over what is already known to be wrong.
        for each in fields(self):
            if each.name in problems:
                setattr(self, each.name, default_of(each))
        try:
            if not launcher:  # with DeepSpeed asked for, the classes above would set it up
                super().__post_init__()
        except (ValueError, TypeError) as error:
            raise SettingsError([*sentences, " ".join(str(error).split())]) from error
        if sentences or launcher:
            raise SettingsError(sentences + launcher)

    @property
    def resolved_server_learning_rate(self) -> float:
        """The server's rate, with the default of its optimizer filled in."""
        if self.server_learning_rate is not None:
            return float(self.server_learning_rate)
        return 1.0 if self.server_optim in ("sgd", "sgd_momentum") else 1e-3

    def _normalise(self) -> None:
        """Write settings that have several forms in one."""
        # It would scale one client's loss by the token counts of clients in other processes.
        self.average_tokens_across_devices = False
        if self.activation_checkpointing is None and self.gradient_checkpointing is None:
            self.activation_checkpointing = True
        if str(self.resume_from_checkpoint).lower() in ("true", "false"):  # a bool, or its text on the command line
            self.resume_from_checkpoint = str(self.resume_from_checkpoint).lower() == "true"
        block = self.per_device_train_clients
        if isinstance(block, str) and block.isdecimal():  # a number on the command line
            self.per_device_train_clients = int(block)
        ranks = self.client_ranks.tolist() if hasattr(self.client_ranks, "tolist") else self.client_ranks
        if isinstance(ranks, (list, tuple)):  # numpy's integers as Python's, which JSON can hold
            ranks = [int(rank) if is_a(rank, int) else rank for rank in ranks]
        self.client_ranks = ranks

    def _refusals(self) -> dict[str, str]:
        """Settings that have no meaning in a federated run, or that would mix its clients."""
        problems = {}
        for each in fields(self):
            value, default = getattr(self, each.name), default_of(each)
            turned_off = value is None or value is False or value == "" or (each.name, value) == _NO_ROUTER_LOSS
            if each.name in _REFUSED and value != default and not (turned_off and not default):
                expected = "unset" if default is None else f"left at {default!r}"
                problems[each.name] = sentence(each.name, expected, value, _REFUSED[each.name])
        return problems

    def _wrong_values(self) -> dict[str, str]:
        """Values out of the range of what works."""
        problems = {}
        for name, least in _AT_LEAST.items():
            value = getattr(self, name)
            if is_a(value, float) and not value >= least:
                problems[name] = sentence(name, f"at least {least}", value, "raise it")
        name, block = "per_device_train_clients", self.per_device_train_clients
        if block != AUTO and not is_a(block, int):
            problems[name] = sentence(name, f"a number of clients, or {AUTO}", block, "write one of these")
        if is_a(self.upload_top_k, float) and not 0 < self.upload_top_k <= 1:
            remedy = "give a share such as 0.1, or remove it to send all"
            problems["upload_top_k"] = sentence("upload_top_k", "above 0 and at most 1", self.upload_top_k, remedy)
        for name in ("server_learning_rate", "hub_deadline", "upload_budget"):
            value = getattr(self, name)
            if is_a(value, float) and not 0 < value < math.inf:
                problems[name] = sentence(name, "above 0", value, "raise it" if value <= 0 else "give a finite number")
        try:
            if isinstance(self.method, str):
                method_class(self.method)
        except MethodError as error:
            problems["method"] = str(error)
        optim = getattr(self.optim, "value", self.optim)
        if optim not in LOCAL_OPTIMIZERS:
            problems["optim"] = sentence("optim", f"one of {', '.join(LOCAL_OPTIMIZERS)}", optim, _why_not(optim))
        schedule = getattr(self.lr_scheduler_type, "value", self.lr_scheduler_type)
        if schedule not in _SCHEDULES:
            expected, remedy = f"one of {', '.join(_SCHEDULES)}", did_you_mean(schedule, _SCHEDULES)
            if schedule in _NOT_OF_THE_ROUND:
                remedy = "the rate is a function of the round, not of what it led to, so choose one of these"
            problems["lr_scheduler_type"] = sentence("lr_scheduler_type", expected, schedule, remedy)
        return problems | self._wrong_ranks()

    def _wrong_ranks(self) -> dict[str, str]:
        name, ranks = "client_ranks", self.client_ranks
        if ranks is None:
            return {}
        if not isinstance(ranks, list) or not ranks:
            return {name: sentence(name, "a list with a rank for each client", ranks, "write one, as in [4, 8, 16]")}
        for position, rank in enumerate(ranks):
            if not is_a(rank, int) or rank < 1:
                where = f"{name}[{position}]"
                return {name: sentence(where, "an integer of at least 1", rank, "give every client such a rank")}
        return {}

    def _contradictions(self, known_wrong: Set[str]) -> Iterator[str]:
        """Settings that are right one by one and wrong together."""
        low, high, law = self.min_rank, self.max_rank, self.rank_distribution
        bounds = {"min_rank": low, "max_rank": high, "rank_distribution": None if law == "homogeneous" else law}
        given = [name for name, value in bounds.items() if value is not None]
        if self.client_ranks is not None and given:
            remedy = f"remove client_ranks or {', '.join(given)}"
            yield sentence("client_ranks", f"unset beside {', '.join(given)}", self.client_ranks, remedy)
        elif low is None or known_wrong & bounds.keys():
            return
        elif high is not None and low > high:
            yield sentence("min_rank", f"at most max_rank ({high})", low, "lower it or raise max_rank")
        elif law == "homogeneous" and low != high:
            remedy = "remove it, or choose a rank_distribution under which ranks differ"
            yield sentence("min_rank", f"unset or equal to max_rank ({high}) for homogeneous ranks", low, remedy)

    def _method_contradictions(self, known_wrong: Set[str]) -> Iterator[str]:
        """Settings that have no meaning for the method."""
        if "method" in known_wrong:
            return
        method = method_class(self.method)
        yield from self._feedback_contradictions(method, known_wrong)
        if method.folds and self.push_to_hub is True:
            remedy = (
                "a round on the Hub is an adapter, and this method changes the base, so remove it or set method to "
                "flora_residual"
            )
            yield sentence("push_to_hub", f"off with method={self.method}", True, remedy)
        if not method.new_basis or known_wrong & {"server_optim", "server_learning_rate"}:
            return
        remedy = (
            f"{self.method} learns in new directions each round, in which neither a part of a step nor moments of "
            "earlier rounds mean anything, so remove it"
        )
        if self.server_optim != "sgd":
            yield sentence("server_optim", f"sgd with method={self.method}", self.server_optim, remedy)
        elif self.resolved_server_learning_rate != 1.0:
            rate = self.server_learning_rate
            yield sentence("server_learning_rate", f"1 or unset with method={self.method}", rate, remedy)

    def _feedback_contradictions(self, method: type[Method], known_wrong: Set[str]) -> Iterator[str]:
        """Why clients cannot keep what they leave out."""
        if self.error_feedback is not True or "upload_top_k" in known_wrong:
            return
        if self.upload_top_k is None:
            yield sentence("error_feedback", "off without upload_top_k", True, "set upload_top_k, or remove it")
        elif method.rows is Method.rows:
            remedy = "what a client leaves out would mean nothing in its next round, so remove it"
            yield sentence("error_feedback", f"off with method={self.method}", True, remedy)
        if self.push_resume_state is True:
            remedy = "what clients have not sent stays with them, so remove one of the two"
            yield sentence("push_resume_state", "off beside error_feedback", True, remedy)

    def _launcher_problems(self) -> list[str]:
        """What `accelerate launch` was told to do and cannot, by the environment it leaves."""
        remedy = "launch with one of recipes/accelerate_configs"
        problems = [
            sentence("the launch", f"free of {what}", f"{name}={os.environ[name]}", f"{_WHOLE_COPY}; {remedy}")
            for name, what in _LAUNCHERS.items()
            if os.environ.get(name, "").lower() in ("1", "true", "yes", "on", "y", "t")
        ]
        precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
        if self.bf16 is False and precision not in ("no", "bf16"):  # bf16 true takes precedence over the launcher
            problems.append(sentence("the launch's mixed_precision", "no or bf16", precision, remedy))
        return problems


def _why_not(optim: Any) -> str:
    if optim not in (name.value for name in OptimizerNames):
        return did_you_mean(optim, LOCAL_OPTIMIZERS)
    return next(why for part, why in _WHY_NOT.items() if part in optim) + ", so choose one of these"
