"""What makes a run that run: everything that decides what it computes."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedModel

from ..config.decides import held_by_default, held_values
from ..config.federation import FederatedSketchConfig
from ..data.rows import digest_rows
from ..methods import method_class
from ..models.adapter import lora_layers
from ..models.description import quantization_of
from ..rounds.ranks import client_ranks
from ..updates.part import UpdatePart

_DEFINING_LORA = "r lora_alpha lora_dropout use_rslora alpha_pattern".split()
# Settings that are held as what they come to. Runs of earlier versions that lack one are held as None.
_RESOLVED = {"server_learning_rate", "error_feedback", "client_ranks", "clients_per_round"}


def ranks_of_clients(args: FederatedSketchConfig, clients: int, global_rank: int) -> np.ndarray:
    """The rank each client affords, int64 `[clients]` by ascending id."""
    if args.client_ranks is not None:
        return np.asarray(args.client_ranks, dtype=np.int64)
    low, high = args.min_rank or 1, args.max_rank or global_rank
    return client_ranks(clients, law=args.rank_distribution, min_rank=low, max_rank=high, seed=args.seed)


def identity(
    args: FederatedSketchConfig,
    model: PeftModel,
    dataset: Dataset,
    clients: int,
    cohort_size: int,
    own_parts: Sequence[UpdatePart] = (),
) -> dict[str, Any]:
    """Everything that decides what a run computes, as plain JSON values. How it is laid out over processes, blocks and
    micro-batches is not part of it, and neither is the number of rounds.

    `dataset` holds the prepared rows of so many `clients`, of which `cohort_size` take part in a round.
    Of a user's own parts of the pipeline of updates, the names of their classes count, and not what is in them.
    """
    base, lora = model.get_base_model(), model.peft_config["default"]
    values = held_values(args)
    values |= {f"lora {name}": getattr(lora, name) for name in _DEFINING_LORA}
    values |= {
        "server_learning_rate": args.resolved_server_learning_rate,
        "error_feedback": args.error_feedback or None,
        "clients": clients,
        "clients_per_round": cohort_size,
        "examples a local step": args.per_device_train_batch_size * args.gradient_accumulation_steps,
        "client_ranks": None if args.client_ranks is None else _digest(args.client_ranks),
        "model": _describe_model(base),
        "adapted layers": _digest(list(lora_layers(model))),
        "data": digest_rows(dataset, args.client_id_column),
    }
    if own_parts:
        values["update_transforms"] = [f"{type(each).__module__}:{type(each).__qualname__}" for each in own_parts]
    if method_class(args.method).folds:
        values["base dtype"] = str(base.dtype)  # what is learned is kept in it
    return json.loads(json.dumps(values, default=str))


def completed(identity: Mapping[str, Any], args: FederatedSketchConfig) -> dict[str, Any]:
    """An identity with the defaults of the settings that it lacks, in the same form.

    A version that did not have a setting worked as its default does. And a setting that nothing is known of is not
    written at all while it is left at its default.
    """
    defaults = {name: value for name, value in held_by_default(args).items() if name not in _RESOLVED}
    return json.loads(json.dumps(defaults, default=str)) | dict(identity)


def _describe_model(model: PreTrainedModel) -> str:
    config = model.config.get_text_config()
    bits = quantization_of(model) or "unquantized"
    return f"{type(model).__name__}, {config.num_hidden_layers} layers of {config.hidden_size}, {bits}"


def _digest(values: list) -> str:
    """A short list as it is, a long one by its length and a hash: a million ranks do not belong into a state file."""
    text = json.dumps(values)
    return text if len(text) <= 200 else f"{len(values)} entries, {hashlib.sha256(text.encode()).hexdigest()[:12]}"
