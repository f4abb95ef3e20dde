"""What is checked before a model is loaded, and what can be checked only on the model. Problems are told together."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from datasets import Dataset
from peft import PeftConfig

from ..common.foreign_text import foreign_names
from ..config.federation import FederatedSketchConfig
from ..data.clients import read_column
from ..data.commonsense import COLUMNS as OPTION_COLUMNS
from ..data.texts import text_problems
from ..methods import method_class
from ..models.adapter_checks import check_adapter


def raise_together(problems: Iterable[str]) -> None:
    """Raise one ValueError that lists every problem, or none."""
    problems = list(problems)
    if problems:
        raise ValueError("\n".join(["The run cannot start:", *(f"- {problem}" for problem in problems)]))


def check_trainer_arguments(
    args: Any,
    train_dataset: Any,
    model: Any,
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
    yield from check_adapter(model, lora)
    yield from _check_dataset(args, train_dataset)
    held_out = eval_dataset if isinstance(eval_dataset, dict) else {"eval_dataset": eval_dataset}
    for name, dataset in held_out.items():
        if dataset is not None or isinstance(eval_dataset, dict):
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


def check_columns(
    args: FederatedSketchConfig, dataset: Dataset, formatting_func: Any, eval_dataset: Any = None
) -> Iterator[str]:
    """Problems of rows that SFTTrainer would find no text in."""
    names = set(dataset.column_names)
    known = {args.dataset_text_field, "messages", "conversations", "input_ids"} & names
    skipped = (args.dataset_kwargs or {}).get("skip_prepare_dataset")
    if not known and not {"prompt", "completion"} <= names and formatting_func is None and not skipped:
        yield (
            f"Expected rows with the columns prompt and completion, or messages, or {args.dataset_text_field}, found "
            f"{foreign_names(names, most=20)}: rename them, or set dataset_text_field to the column that "
            "holds the text."
        )
    held_out = eval_dataset if isinstance(eval_dataset, dict) else {"eval_dataset": eval_dataset}
    for name, rows in {"train_dataset": dataset, **held_out}.items():
        if isinstance(rows, Dataset) and formatting_func is None and not skipped:
            yield from _check_prompts(name, rows)
            yield from text_problems(name, rows, _columns_read(args, {*rows.column_names}))


def _check_prompts(name: str, rows: Dataset) -> Iterator[str]:
    """Problems of rows that are still to be prepared, and that SFTTrainer would take for something else, or miss."""
    names = set(rows.column_names)
    if "input_ids" in names:
        return
    if "prompt" in names and "completion" not in names:
        remedy = "rename it to have another column trained on, or add the completions"
        yield f"Expected {name} to have a column completion beside prompt, found none: {remedy}."
    elif not len(rows):
        yield f"Expected {name} to have rows, found none: pass some, or leave it out."


def _columns_read(args: FederatedSketchConfig, names: set[str]) -> list[str]:
    """The columns that rows are tokenised from."""
    for columns in (["input_ids"], ["prompt", "completion"], ["messages"], [args.dataset_text_field]):
        if {*columns} <= names:
            return columns
    return []


def check_round_callbacks(found: int) -> Iterator[str]:
    """Problems of the number of callbacks that run rounds."""
    if found != 1:
        yield f"Expected one RoundCallback among the callbacks, found {found}: one folds every round; leave one."


def check_own_loss(name: str, args: FederatedSketchConfig) -> Iterator[str]:
    """Problems of a trainer whose class has a loss of its own, which knows nothing of clients."""
    block = getattr(args, "per_device_train_clients", 1)
    if block != 1:
        yield (
            f"Expected per_device_train_clients to be 1 with a loss of its own in {name}.compute_loss, which would "
            f"mix the clients of a step, found {block}: set it to 1."
        )


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
    args: FederatedSketchConfig, dataset: Dataset, columns: Sequence[str], before: np.ndarray, after: np.ndarray
) -> Iterator[str]:
    """Problems of the prepared training rows.

    `columns` are those that a step reads; `before` holds the clients of the rows given, each once; `after` the client
    of each row prepared.
    """
    if not {*columns} <= {*dataset.column_names}:
        yield (
            f"Expected prepared rows with {' and '.join(columns)}, found "
            f"{foreign_names(dataset.column_names, most=20)}: let the trainer prepare them, or add these columns."
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


def _check_dataset(args: FederatedSketchConfig, dataset: Any) -> Iterator[str]:
    yield from _check_rows("train_dataset", dataset)
    if not isinstance(dataset, Dataset):
        return
    column = args.client_id_column
    if column not in dataset.column_names:
        yield (
            f"Expected an integer column {column!r} in train_dataset, found "
            f"{foreign_names(dataset.column_names, most=20)}: add it with "
            "fslora_hf.data.partition.partition, or name yours with client_id_column."
        )
    elif not str(getattr(dataset.features[column], "dtype", "")).startswith(("int", "uint")):
        yield (
            f"Expected integers in column {column!r}, found {_kind(dataset.features[column])}: turn names into ids "
            "with fslora_hf.data.partition.partition(..., 'column')."
        )
    elif len(dataset) == 0 or read_column(dataset, column).null_count:
        yield (
            f"Expected an id in every row of column {column!r}, found {'no rows' if len(dataset) == 0 else 'nulls'}: "
            "leave rows without a client out."
        )


def _check_rows(name: str, dataset: Any) -> Iterator[str]:
    if dataset is None:
        yield f"Expected {name} to be a datasets.Dataset, found none: pass one."
    elif isinstance(dataset, dict):
        kind, splits = type(dataset).__name__, list(map(repr, dataset))
        remedy = f"pass one of them, as in {name}=data[{splits[0]}]" if splits else "pass a data set"
        yield (
            f"Expected {name} to be one datasets.Dataset, found a {kind} of the splits "
            f"{', '.join(splits[:5]) or 'none'}: {remedy}."
        )
    elif not isinstance(dataset, Dataset):
        kind = type(dataset).__name__
        remedy = "load it without streaming" if "Iterable" in kind else "make one with Dataset.from_list"
        yield f"Expected {name} to be a datasets.Dataset, whose rows are read by number, found a {kind}: {remedy}."
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
