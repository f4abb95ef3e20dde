"""What the protocols share: rows that can be asked, and batches of token ids of unequal length."""

from collections.abc import Sequence

import torch
from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..data.prompts import options


def checked_rows(dataset: Dataset, *columns: str) -> list[dict]:
    """The rows of a dataset with these text columns; where it has answers, each is one of its row's options.

    Raises:
        ValueError: there are no rows, a column is missing, or a row has no usable options or another answer.
    """
    missing = [column for column in columns if column not in dataset.column_names]
    if missing or len(dataset) == 0:
        raise ValueError(
            f"Expected a dataset with rows and the columns {', '.join(columns)}, found {len(dataset)} rows and the "
            f"columns {', '.join(dataset.column_names)}: load one with load_commonsense or load_miniature."
        )
    for column in columns:
        if getattr(dataset.features[column], "dtype", None) != "string":
            raise ValueError(
                f"Expected texts in the column {column}, found {dataset.features[column]}: render the rows first, for "
                "instance with fslora_hf.data.render_prompt."
            )
    rows = list(dataset)
    for number, row in enumerate(rows):
        empty = [column for column in columns if row[column] is None]
        if empty:
            raise ValueError(
                f"Expected a text in {', '.join(empty)} of row {number} (from 0), found none: fill it in or remove "
                "the row."
            )
        if "answer" not in columns:
            continue
        try:
            allowed = options(row)
        except ValueError as error:
            raise ValueError(f"Row {number} (from 0) cannot be asked. {error}") from error
        if row["answer"] not in allowed or row["answer"] not in row["completion"]:
            raise ValueError(
                f"Expected an answer that is one of {'/'.join(allowed)} and is named in the completion, found answer "
                f"{row['answer']!r} and completion {row['completion']!r} in row {number} (from 0): correct the row."
            )
    return rows


def prompt_tokens(tokenizer: PreTrainedTokenizerBase, prompts: list[str]) -> list[list[int]]:
    """Token ids of the prompts.

    Raises:
        ValueError: a prompt has none.
    """
    given = tokenizer(prompts)["input_ids"]
    for number, ids in enumerate(given):
        if not ids:
            raise ValueError(
                f"Expected a prompt with tokens, found none in row {number} (from 0): write one or leave the row out."
            )
    return given


def refuse_long(lengths: Sequence[int], max_length: int | None, what: str = "") -> None:
    """Raises ValueError if a row has more than `max_length` tokens; nothing is ever cut off in an evaluation."""
    longest = max(range(len(lengths)), key=lengths.__getitem__)
    if max_length is not None and lengths[longest] > max_length:
        raise ValueError(
            f"Expected rows of at most {max_length} tokens{what}, found {lengths[longest]} in row {longest} (from 0): "
            "raise max_length, take a model that reads more, or leave the row out."
        )


def pad(sequences: list[list[int]], device: torch.device, left: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask (1 on tokens), int64 `[sequences, longest]` each; the id under a zero of the mask means nothing.

    The tokenizer's own padding is left alone: which side it takes, and whether it has a pad token, changes nothing.
    """
    longest = max(len(ids) for ids in sequences)
    ids = torch.zeros(len(sequences), longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for i, sequence in enumerate(sequences):
        start = longest - len(sequence) if left else 0
        ids[i, start : start + len(sequence)] = torch.tensor(sequence, dtype=torch.int64)
        mask[i, start : start + len(sequence)] = 1
    return ids.to(device), mask.to(device)


def device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
