"""The configuration of a federated run: TRL's `SFTConfig`, and what a federation adds to it."""

import math
from dataclasses import dataclass, field, fields

from trl import SFTConfig

from ..common.settings import SettingsError, default_of, field_problems, is_a, said
from ..methods import METHODS as METHOD_CLASSES
from ..storage.result_files import PROTOCOLS
from .refusals import contradictions, launcher_problems, meaningless, trial_problems, wrong_values

METHODS = tuple(METHOD_CLASSES)
RANK_DISTRIBUTIONS = ("homogeneous", "uniform", "normal", "heavy_tail_low")
EVAL_PROTOCOLS = (*PROTOCOLS, "loss")
_OF_SEVERAL_KINDS = {"resume_from_checkpoint", "accelerator_config"}  # the latter an object of accelerate's in a copy
SERVER_OPTIMIZERS = ("sgd", "sgd_momentum", "adam", "adamw")


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
    max_lost_rounds: int = field(
        default=3,
        metadata={
            "help": "End the run with an error after so many rounds in a row that fold no update, or in which most "
            "clients' losses are not finite or have leapt (of fewer than three clients a round, after more). 0: never."
        },
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
            "help": "Rows longer than max_length: truncate cuts the prompt from the left, drop leaves the row out, "
            "keep_start cuts the end, answers too, as SFTTrainer does.",
            "choices": ("truncate", "drop", "keep_start"),
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
        problems = field_problems(self, besides=_OF_SEVERAL_KINDS) | wrong_values(self) | meaningless(self)
        sentences = [*problems.values(), *contradictions(self, problems.keys())]
        launcher = launcher_problems(self)
        # The classes above check the rest, and must not stumble over what is already known to be wrong.
        for each in fields(self):
            if each.name in problems:
                setattr(self, each.name, default_of(each))
        try:
            if not launcher:  # with DeepSpeed asked for, the classes above would set it up
                super().__post_init__()
                sentences += trial_problems(self)
        except Exception as error:  # whatever a value of another kind makes them stumble over
            text = f"Expected settings that transformers takes, found '{said(error)}': correct what it names."
            raise SettingsError([*sentences, *launcher, text]) from None  # the cause's text may quote a secret
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
        if self.max_grad_norm == math.inf:  # no clipping, in a form that JSON has
            self.max_grad_norm = 0.0
        for name in ("adam_beta1", "adam_beta2"):  # 0 in a file: torch takes no integer
            beta = getattr(self, name)
            setattr(self, name, float(beta) if is_a(beta, int) and beta == 0 else beta)
        ranks = self.client_ranks.tolist() if hasattr(self.client_ranks, "tolist") else self.client_ranks
        if isinstance(ranks, (list, tuple)):  # numpy's integers as Python's, which JSON can hold
            ranks = [int(rank) if is_a(rank, int) else rank for rank in ranks]
        self.client_ranks = ranks
