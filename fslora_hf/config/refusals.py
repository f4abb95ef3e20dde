"""What a configuration cannot be, and why: values out of range, settings without a meaning here, contradictions."""

import math
import os
from collections.abc import Iterator, Set
from dataclasses import fields
from typing import Any

import torch
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames

from ..common.settings import default_of, did_you_mean, is_a, said, sentence
from ..methods import Method, MethodError, method_class
from .ranges import range_problems
from .schedule import round_schedule

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
REFUSED = {
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
    "truncation_mode": "overlong_prompts says what becomes of long rows, so remove it and set that",
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
_LONGEST_NAME, _LONGEST_PATH = 255, 3800  # bytes; a run's own files need some
_DEEPEST = 32  # levels of a mapping
_MOST_EXAMPLES = 10**8  # of a client in a round, each a number of its plan


def meaningless(args: Any) -> dict[str, str]:
    """Settings that have no meaning in a federated run, or that would mix its clients."""
    problems = {}
    for each in fields(args):
        value, default = getattr(args, each.name), default_of(each)
        turned_off = value is None or value is False or value == "" or (each.name, value) == _NO_ROUTER_LOSS
        if each.name in REFUSED and value != default and not (turned_off and not default):
            expected = "unset" if default is None else f"left at {default!r}"
            problems[each.name] = sentence(each.name, expected, value, REFUSED[each.name])
    return problems


def wrong_values(args: Any) -> dict[str, str]:
    """Values out of the range of what works."""
    problems = range_problems(args)
    if args.logging_steps == 0 and getattr(args.logging_strategy, "value", args.logging_strategy) in ("no", "epoch"):
        problems.pop("logging_steps", None)  # then nothing counts them
    name, block = "per_device_train_clients", args.per_device_train_clients
    if block != AUTO and not is_a(block, int):
        problems[name] = sentence(name, f"a number of clients, or {AUTO}", block, "write one of these")
    if is_a(args.upload_top_k, float) and not 0 < args.upload_top_k <= 1:
        remedy = "give a share such as 0.1, or remove it to send all"
        problems["upload_top_k"] = sentence("upload_top_k", "above 0 and at most 1", args.upload_top_k, remedy)
    try:
        if isinstance(args.method, str):
            method_class(args.method)
    except MethodError as error:
        problems["method"] = str(error)
    optim = getattr(args.optim, "value", args.optim)
    if optim not in LOCAL_OPTIMIZERS:
        problems["optim"] = sentence("optim", f"one of {', '.join(LOCAL_OPTIMIZERS)}", optim, _why_not(optim))
    schedule = getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)
    if schedule not in _SCHEDULES:
        expected, remedy = f"one of {', '.join(_SCHEDULES)}", did_you_mean(schedule, _SCHEDULES)
        if schedule in _NOT_OF_THE_ROUND:
            remedy = "the rate is a function of the round, not of what it led to, so choose one of these"
        problems["lr_scheduler_type"] = sentence("lr_scheduler_type", expected, schedule, remedy)
    return problems | _wrong_ranks(args) | _wrong_mappings(args) | folder_problems("output_dir", args.output_dir)


def folder_problems(name: str, value: Any) -> dict[str, str]:
    """What no disk can have as a folder's name, by the setting's name; else nothing."""
    if not is_a(value, str):
        return {}
    text, remedy = os.fspath(value), "name another folder"
    try:
        parts = os.fsencode(text).split(os.fsencode(os.sep))
    except (UnicodeEncodeError, AttributeError):  # half a character
        return {name: sentence(name, "a name of whole characters", value, remedy)}
    if not text.strip() or "\0" in text:
        return {name: sentence(name, "the name of a folder", value, remedy)}
    if len(os.fsencode(text)) > _LONGEST_PATH or max(map(len, parts)) > _LONGEST_NAME:
        expected = f"of names of at most {_LONGEST_NAME} bytes, and of {_LONGEST_PATH} in all"
        return {name: sentence(name, expected, value, "shorten it")}
    return {}


def _wrong_mappings(args: Any) -> dict[str, str]:
    """Mappings with a number that no file of a run can hold: JSON has neither NaN nor infinity."""
    names = [each.name for each in fields(args) if isinstance(getattr(args, each.name), dict)]
    expected = "a mapping of finite numbers and texts, no deeper than needed"
    return {
        name: sentence(name, expected, getattr(args, name), "correct its values")
        for name in names
        if not _is_finite(getattr(args, name))
    }


def _is_finite(value: Any, level: int = 0) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return level < _DEEPEST and all(_is_finite(each, level + 1) for each in inner)


def _wrong_ranks(args: Any) -> dict[str, str]:
    name, ranks = "client_ranks", args.client_ranks
    if ranks is None:
        return {}
    if not isinstance(ranks, list) or not ranks:
        return {name: sentence(name, "a list with a rank for each client", ranks, "write one, as in [4, 8, 16]")}
    for position, rank in enumerate(ranks):
        if not is_a(rank, int) or rank < 1:
            where = f"{name}[{position}]"
            return {name: sentence(where, "an integer of at least 1", rank, "give every client such a rank")}
    return {}


def contradictions(args: Any, known_wrong: Set[str]) -> Iterator[str]:
    """Settings that are right one by one and wrong together, `known_wrong` left alone."""
    if args.load_best_model_at_end is True and args.eval_rounds == 0:
        remedy = "set it, so that there are rounds to choose from"
        yield sentence("eval_rounds", "above 0 with load_best_model_at_end", args.eval_rounds, remedy)
    yield from _rank_contradictions(args, known_wrong)
    sizes = ("local_steps", "per_device_train_batch_size", "gradient_accumulation_steps")
    product = math.prod(getattr(args, name) for name in sizes) if not known_wrong & {*sizes} else 0
    if product > _MOST_EXAMPLES:
        expected = f"of at most {_MOST_EXAMPLES} examples together, a client's in a round"
        yield f"Expected {', '.join(sizes)} to be {expected}, found {product}: lower one of them."
    if "method" not in known_wrong:
        method = method_class(args.method)
        yield from _feedback_contradictions(args, method, known_wrong)
        yield from _method_contradictions(args, method, known_wrong)


def _rank_contradictions(args: Any, known_wrong: Set[str]) -> Iterator[str]:
    low, high, law = args.min_rank, args.max_rank, args.rank_distribution
    bounds = {"min_rank": low, "max_rank": high, "rank_distribution": None if law == "homogeneous" else law}
    given = [name for name, value in bounds.items() if value is not None]
    if args.client_ranks is not None and given:
        remedy = f"remove client_ranks or {', '.join(given)}"
        yield sentence("client_ranks", f"unset beside {', '.join(given)}", args.client_ranks, remedy)
    elif low is None or known_wrong & bounds.keys():
        return
    elif high is not None and low > high:
        yield sentence("min_rank", f"at most max_rank ({high})", low, "lower it or raise max_rank")
    elif law == "homogeneous" and low != high:
        remedy = "remove it, or choose a rank_distribution under which ranks differ"
        yield sentence("min_rank", f"unset or equal to max_rank ({high}) for homogeneous ranks", low, remedy)


def _method_contradictions(args: Any, method: type[Method], known_wrong: Set[str]) -> Iterator[str]:
    """Settings that have no meaning for the method."""
    if method.folds and args.push_to_hub is True:
        remedy = (
            "a round on the Hub is an adapter, and this method changes the base, so remove it or set method to "
            "flora_residual"
        )
        yield sentence("push_to_hub", f"off with method={args.method}", True, remedy)
    if not method.new_basis or known_wrong & {"server_optim", "server_learning_rate"}:
        return
    remedy = (
        f"{args.method} learns in new directions each round, in which neither a part of a step nor moments of "
        "earlier rounds mean anything, so remove it"
    )
    if args.server_optim != "sgd":
        yield sentence("server_optim", f"sgd with method={args.method}", args.server_optim, remedy)
    elif args.resolved_server_learning_rate != 1.0:
        rate = args.server_learning_rate
        yield sentence("server_learning_rate", f"1 or unset with method={args.method}", rate, remedy)


def _feedback_contradictions(args: Any, method: type[Method], known_wrong: Set[str]) -> Iterator[str]:
    """Why clients cannot keep what they leave out."""
    if args.error_feedback is not True or "upload_top_k" in known_wrong:
        return
    if args.upload_top_k is None:
        yield sentence("error_feedback", "off without upload_top_k", True, "set upload_top_k, or remove it")
    elif method.rows is Method.rows:
        remedy = "what a client leaves out would mean nothing in its next round, so remove it"
        yield sentence("error_feedback", f"off with method={args.method}", True, remedy)
    if args.push_resume_state is True:
        remedy = "what clients have not sent stays with them, so remove one of the two"
        yield sentence("push_resume_state", "off beside error_feedback", True, remedy)


def trial_problems(args: Any) -> Iterator[str]:
    """Settings that only the local optimizer, or the schedule, can judge: each is made once, on one number."""
    from transformers import Trainer  # slow to import, and not needed to read settings

    try:
        kind, options = Trainer.get_optimizer_cls_and_kwargs(args)
        kind([torch.nn.Parameter(torch.zeros(1))], **options)
    except Exception as error:  # each optimizer raises types of its own
        yield f"Expected settings that optim={args.optim.value} takes, found: {said(error)}: correct optim_args."
    try:
        factors = [round_schedule(args, args.num_rounds)(round) for round in (0, args.num_rounds - 1)]
    except Exception as error:
        schedule = args.lr_scheduler_type.value
        remedy = "correct lr_scheduler_kwargs"
        yield f"Expected settings that lr_scheduler_type={schedule} takes, found: {said(error)}: {remedy}."
    else:
        if not all(is_a(factor, float) and abs(factor) < math.inf for factor in factors):
            remedy = "correct lr_scheduler_kwargs"
            yield sentence("the first and the last round's share of learning_rate", "numbers", factors, remedy)


def launcher_problems(args: Any) -> list[str]:
    """What `accelerate launch` was told to do and cannot, by the environment it leaves."""
    remedy = "launch with one of recipes/accelerate_configs"
    problems = [
        sentence("the launch", f"free of {what}", f"{name}={os.environ[name]}", f"{_WHOLE_COPY}; {remedy}")
        for name, what in _LAUNCHERS.items()
        if os.environ.get(name, "").lower() in ("1", "true", "yes", "on", "y", "t")
    ]
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if args.bf16 is False and precision not in ("no", "bf16"):  # bf16 true takes precedence over the launcher
        problems.append(sentence("the launch's mixed_precision", "no or bf16", precision, remedy))
    return problems


def _why_not(optim: Any) -> str:
    if optim not in (name.value for name in OptimizerNames):
        return did_you_mean(optim, LOCAL_OPTIMIZERS)
    return next(why for part, why in _WHY_NOT.items() if part in optim) + ", so choose one of these"
