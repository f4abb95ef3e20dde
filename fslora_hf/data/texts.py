"""What may be wrong with the texts of a data set, found in Arrow's memory, without a loop over rows that are right."""

from collections.abc import Collection, Iterator
from typing import Any

import pyarrow as pa
from datasets import Dataset


def check_encoding(dataset: Dataset, where: str) -> None:
    """Raises ValueError at the first text that is not UTF-8; a reader passes some of them over until they are used."""
    for column in dataset.column_names:
        if _is_whole(dataset, column):
            continue
        for number, value in enumerate(_column(dataset, column)):
            try:
                value.as_py()
            except UnicodeDecodeError:
                raise ValueError(
                    f"Expected {where} to hold UTF-8 text, found another encoding in column {column}, row {number} "
                    "(from 0): save it as UTF-8."
                ) from None


def text_problems(name: str, dataset: Dataset, columns: Collection[str]) -> Iterator[str]:
    """A sentence for each of the columns that has a row without a text, a list of messages, or one of token ids."""
    for column in columns:
        expected = "a list of token ids" if column == "input_ids" else "a text or a list of messages"
        stored = dataset.data.column(column)  # of all rows there are, those that are not chosen with them
        if stored.null_count == 0 and _is_read(stored.type, column):
            continue
        for number, row in enumerate(dataset.select_columns([column])):
            found = _found(row[column], column)
            if found:
                yield (
                    f"Expected {expected} in every row of column {column} of {name}, found {found} in row {number} "
                    "(from 0): correct the row, or leave it out."
                )
                break


def _is_read(kind: pa.DataType, column: str) -> bool:
    """Whether all that is stored as this kind can be tokenised, or is tokens."""
    inner = kind.value_type if _is_list(kind) else None
    if column == "input_ids":
        return inner is not None and pa.types.is_integer(inner)
    is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
    return is_text or (inner is not None and pa.types.is_struct(inner))


def _found(value: Any, column: str) -> str | None:
    """What a row has in place of what can be tokenised; None if it has that."""
    if value is None:
        return "nothing"
    if isinstance(value, list):
        wanted = int if column == "input_ids" else dict
        return None if all(isinstance(each, wanted) for each in value) else "a list of other things"
    return None if isinstance(value, str) and column != "input_ids" else f"a value of the kind {type(value).__name__}"


def _is_whole(dataset: Dataset, column: str) -> bool:
    try:
        dataset.data.column(column).validate(full=True)
    except pa.ArrowInvalid:
        return False
    return True


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def _column(dataset: Dataset, column: str) -> pa.ChunkedArray:
    return dataset.select_columns([column]).with_format("arrow")[:][column]
