"""What is checked before a model is loaded, and what can be checked only on the model. Problems are told together."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import numpy as np
from datasets import Dataset
from peft import LoraConfig, PeftConfig, PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn

from .adapter import global_pair, lora_layers
from .clients import read_column
from .config import FederatedSketchConfig
from .data.commonsense import COLUMNS as OPTION_COLUMNS
from .evaluation.results import quantization_of
from .methods import method_class


def raise_together(problems: Iterable[str]) -> None:
    """Raise one ValueError that lists every problem, or none."""
    problems = list(problems)
    if problems:
        raise ValueError("\n".join(["The run cannot start:", *(f"- {problem}" for problem in problems)]))


@contextmanager
def unmatched_targets_told() -> Iterator[None]:
    """PEFT's error about target modules that match nothing, in the form of the others."""
    try:
        yield
    except ValueError as error:
        if not str(error).startswith("Target modules"):
            raise
        raise ValueError(
            f"Expected target_modules to match layers of the model, found none ({error}): name modules of this model."
        ) from error


def check_trainer_arguments(
    args: Any,
    train_dataset: Any,
    lora: PeftConfig | None,
    eval_dataset: Any,
    unsupported: dict[str, Any],
) -> Iterator[str]:
    """Problems of the trainer's arguments, before anything is loaded."""
    if not isinstance(args, FederatedSketchConfig):
        yield f"Expected args to be a FederatedSketchConfig, found a {type(args).__name__}: build one from its fields."
        return
    if (args.eval_rounds or args.eval_on_start) and eval_dataset is None:
        yield f"Expected an eval_dataset with eval_rounds={args.eval_rounds}, found none: pass one."
    for name, value in unsupported.items():
        if value is not None and value != (None, None):
            yield f"Expected no {name}, found one: the trainer makes its own, one for every client; leave it out."
    yield from _check_lora(lora)
    yield from _check_dataset(args, train_dataset)
    held_out = eval_dataset if isinstance(eval_dataset, dict) else {"eval_dataset": eval_dataset}
    for name, dataset in held_out.items():
        if dataset is not None:
            yield from _check_rows(name, dataset)
            if isinstance(dataset, Dataset):
                yield from _check_options(args.eval_protocol, name, dataset)


def _check_options(protocol: str | None, name: str, dataset: Dataset) -> Iterator[str]:
    """Problems of evaluation rows that shall be asked, not only measured by their loss."""
    missing = sorted(set(OPTION_COLUMNS) - set(dataset.column_names))
    if protocol not in (None, "loss") and missing:
        yield (
            f"Expected {name} to have the columns {', '.join(OPTION_COLUMNS)} with eval_protocol={protocol}, found no "
            f"{', '.join(missing)}: add them, or set eval_protocol to loss."
        )


def check_columns(args: FederatedSketchConfig, dataset: Dataset, formatting_func: Any) -> Iterator[str]:
    """Problems of rows that SFTTrainer would find no text in."""
    names = set(dataset.column_names)
    known = {args.dataset_text_field, "messages", "conversations", "input_ids"} & names
    skipped = (args.dataset_kwargs or {}).get("skip_prepare_dataset")
    if not known and not {"prompt", "completion"} <= names and formatting_func is None and not skipped:
        yield (
            f"Expected rows with the columns prompt and completion, or messages, or {args.dataset_text_field}, found "
            f"{', '.join(sorted(names))}: rename them, or set dataset_text_field to the column that holds the text."
        )


def check_round_callbacks(found: int) -> Iterator[str]:
    """Problems of the number of callbacks that run rounds."""
    if found != 1:
        yield f"Expected one RoundCallback among the callbacks, found {found}: one folds every round; leave one."


def check_clients(args: FederatedSketchConfig, clients: int, ranks: np.ndarray, global_rank: int) -> Iterator[str]:
    """Problems that show once the number of clients and their ranks are known."""
    if (args.clients_per_round or clients) > clients:
        yield (
            f"Expected clients_per_round of at most {clients}, the clients in the data, found "
            f"{args.clients_per_round}: lower it, or partition the data among more clients."
        )
    if len(ranks) != clients:
        yield (
            f"Expected client_ranks with {clients} entries, one for each client in the data by ascending id, found "
            f"{len(ranks)}: make the list as long as there are clients, or use a rank_distribution."
        )
    highest = max(ranks.max(), args.max_rank or 0)
    if highest > global_rank or ranks.min() < 1:
        yield (
            f"Expected client ranks from 1 to the global rank {global_rank}, found {ranks.min()} to {highest}: "
            "lower client_ranks or max_rank, or raise the LoRA rank r."
        )
    if method_class(args.method).full_rank_only and (ranks != global_rank).any():
        yield (
            f"Expected every client to have the global rank {global_rank} with method={args.method}, found ranks "
            f"{ranks.min()} to {ranks.max()}: give all clients the global rank, or use method=fslora."
        )


def check_prepared_rows(
    args: FederatedSketchConfig, dataset: Dataset, before: np.ndarray, after: np.ndarray
) -> Iterator[str]:
    """Problems of the prepared training rows.

    `before` holds the clients of the rows given, each once; `after` the client of each row prepared.
    """
    if not {"input_ids", "labels"} <= set(dataset.column_names):
        yield (
            f"Expected prepared rows with input_ids and labels, found {dataset.column_names}: let the trainer prepare "
            "them, or add both columns."
        )
        return
    ids, counts = np.unique(after, return_counts=True)
    lost = np.setdiff1d(before, ids, assume_unique=True)  # else numpy sorts out a million ids again, slowly
    if len(lost):
        yield (
            f"Expected every client to keep rows in preparation, found that {_some(lost)} lost all of theirs, "
            "too long or without a scored token: raise max_length, set overlong_prompts to keep_start, check the "
            "labels, or leave these clients out of the data."
        )
    few = ids[counts < args.min_examples]
    if len(few):
        yield (
            f"Expected at least min_examples={args.min_examples} prepared rows of every client, found fewer at "
            f"{_some(few)}: lower min_examples, or give these clients more data."
        )


def check_fold(method: str, quantized: bool) -> Iterator[str]:
    """Problems of a base model that the method is to change."""
    if quantized and method_class(method).folds:
        yield (
            f"Expected an unquantized base with method={method}, which folds what is learned into its weights, found "
            "a quantized one: load it without quantization, or use method=flora_residual."
        )


def _check_folded_layers(model: PeftModel, layers: dict[str, LoraLayer]) -> Iterator[str]:
    """Weights that are also used elsewhere, where nothing is to change."""
    base = model.get_base_model()
    names: dict[int, list[str]] = {}
    for name, parameter in base.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    for name, layer in layers.items():
        used = names[id(layer.get_base_layer().weight)]
        if len(used) > 1:
            yield (
                f"Expected a weight of its own in {name}, which shall be changed, found it shared by "
                f"{' and '.join(used)}: leave it out of target_modules, or use method=flora_residual."
            )


def check_layers(model: PeftModel, aux_loss: bool, method: str) -> Iterator[str]:
    """Problems of the layers that the adapter's target modules matched."""
    yield from check_fold(method, quantization_of(model.get_base_model()) is not None)
    if aux_loss:
        yield (
            "Expected a loss that keeps clients apart, found a router loss over the whole batch: set "
            "router_aux_loss_coef to 0.0."
        )
    layers = lora_layers(model)
    if not layers:
        yield "Expected target_modules to match linear layers, found none: name modules of this model."
    elif method_class(method).folds:
        yield from _check_folded_layers(model, layers)
    targets = model.peft_config["default"].target_modules
    for target in [] if isinstance(targets, str) else sorted(targets):
        if not any(f".{name}".endswith(f".{target}") for name in layers):
            yield f"Expected every name in target_modules to match a layer, found none for {target!r}: correct it."
    devices = sorted({str(tensor.device) for tensors in global_pair(model) for tensor in tensors.values()})
    if len(devices) > 1:
        yield (
            f"Expected the whole model on one device, found it on {', '.join(devices)}: start with accelerate launch, "
            "or set model_init_kwargs to {'device_map': {'': 0}}."
        )
    output = model.get_output_embeddings()
    ours = {id(part["default"].weight) for layer in layers.values() for part in (layer.lora_A, layer.lora_B)}
    others = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in ours]
    if others:
        yield (
            f"Expected the linear layers' adapter default to be all that is trainable, found {', '.join(others[:3])} "
            f"({len(others)} tensors): freeze the rest, activate default, and leave it out of target_modules."
        )
    for name, layer in layers.items():
        pair = layer.lora_A["default"], layer.lora_B["default"]
        if not all(type(part) is nn.Linear for part in pair):
            kind = type(layer.get_base_layer()).__name__
            yield f"Expected linear target modules, found {name}, a {kind}: leave it out."
        if layer is output:
            yield "Expected target_modules without the LM head, found it among them: leave it out."
        if layer.lora_variant:
            kind = type(layer.lora_variant["default"]).__name__
            yield f"Expected plain LoRA in {name}, found the variant {kind}: leave it out."


def _check_lora(lora: PeftConfig | None) -> Iterator[str]:
    if not isinstance(lora, LoraConfig):
        found = "none" if lora is None else f"a {type(lora).__name__}"
        yield f"Expected a peft.LoraConfig as peft_config (or a model with a LoRA adapter), found {found}: pass one."
        return
    if lora.r < 1:
        yield f"Expected a global rank r of at least 1, found {lora.r}: raise it."
    if lora.bias != "none":
        yield f"Expected bias='none', found {lora.bias!r}: biases of different clients cannot share a base model."
    if lora.init_lora_weights not in (True, False, "gaussian", "orthogonal"):
        yield (
            f"Expected init_lora_weights to be True, False, 'gaussian' or 'orthogonal', found "
            f"{lora.init_lora_weights!r}: it changes the base model, which no checkpoint holds; use one of these."
        )
    targets = [lora.target_modules] if isinstance(lora.target_modules, str) else list(lora.target_modules or [])
    if any(target == "lm_head" or target.endswith(".lm_head") for target in targets):
        yield "Expected target_modules without lm_head, found it: the loss reads the head's own weights; leave it out."
    for field in fields(lora):
        value = getattr(lora, field.name)
        refused = field.metadata.get("is_lora_variant") or field.name in _REFUSED_LORA_FIELDS
        if refused and value:
            yield (
                f"Expected plain LoRA, found {field.name}={value!r} in the peft_config: stacked client adapters do "
                "not have it; leave it out."
            )


_REFUSED_LORA_FIELDS = (
    "rank_pattern",
    "modules_to_save",
    "lora_bias",
    "trainable_token_indices",
    "layer_replication",
    "target_parameters",
    "use_dora",
    "megatron_config",
)


def _check_dataset(args: FederatedSketchConfig, dataset: Any) -> Iterator[str]:
    yield from _check_rows("train_dataset", dataset)
    if not isinstance(dataset, Dataset):
        return
    column = args.client_id_column
    if column not in dataset.column_names:
        yield (
            f"Expected an integer column {column!r} in train_dataset, found {dataset.column_names}: add it with "
            "fslora_hf.partition.partition, or name yours with client_id_column."
        )
    elif not str(getattr(dataset.features[column], "dtype", "")).startswith(("int", "uint")):
        yield (
            f"Expected integers in column {column!r}, found {_kind(dataset.features[column])}: turn names into ids "
            "with fslora_hf.partition.partition(..., 'column')."
        )
    elif len(dataset) == 0 or read_column(dataset, column).null_count:
        yield (
            f"Expected an id in every row of column {column!r}, found {'no rows' if len(dataset) == 0 else 'nulls'}: "
            "leave rows without a client out."
        )


def _check_rows(name: str, dataset: Any) -> Iterator[str]:
    if not isinstance(dataset, Dataset):
        yield (
            f"Expected {name} to be a datasets.Dataset, found {type(dataset).__name__}: rows are read by number; load "
            "it without streaming."
        )
    elif {"image", "images"} & set(dataset.column_names):
        yield f"Expected text data in {name}, found an image column: vision data is not supported; remove it."


def _kind(feature: Any) -> str:
    return getattr(feature, "dtype", None) or type(feature).__name__


def _some(values: np.ndarray) -> str:
    """`client 3`, or `5 clients (3, 7, 8, ...)`."""
    if len(values) == 1:
        return f"client {values[0]}"
    listed = ", ".join(str(value) for value in values[:5]) + (", ..." if len(values) > 5 else "")
    return f"{len(values)} clients ({listed})"
