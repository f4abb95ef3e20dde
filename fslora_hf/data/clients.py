"""Who the clients are: which rows of the data set each one owns.

Arrays, never one object a client, so that a million clients cost a few megabytes and a fraction of a second.
"""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from datasets import Dataset


@dataclass(frozen=True, eq=False)
class ClientIndex:
    """The rows of a data set grouped by the client that owns them (read-only arrays; N clients, M rows).

    Attributes:
        ids: int64 `[N]`, the distinct client ids, ascending; they may be sparse and negative.
        offsets: int64 `[N + 1]`; client i of `ids` owns `rows[offsets[i] : offsets[i + 1]]`.
        rows: int64 `[M]`, row numbers of the data set by client, ascending within a client.
    """

    ids: np.ndarray
    offsets: np.ndarray
    rows: np.ndarray

    @classmethod
    def from_column(cls, column: np.ndarray, name: str = "client_id") -> "ClientIndex":
        """Group rows by an integer column `[M]`, called `name` in errors.

        Raises ValueError where the column is empty, has more than one axis, or holds anything but int64 values.
        """
        column = as_client_ids(column, name)
        rows = np.argsort(column, kind="stable")
        grouped = column[rows]
        starts = np.flatnonzero(np.r_[True, grouped[1:] != grouped[:-1]])
        arrays = grouped[starts], np.r_[starts, len(column)].astype(np.int64), rows.astype(np.int64, copy=False)
        for array in arrays:
            array.flags.writeable = False
        return cls(*arrays)

    @classmethod
    def from_dataset(cls, dataset: Dataset, client_id_column: str = "client_id") -> "ClientIndex":
        """Group the rows of a data set by its client column; ValueError where it is missing or not int64 values."""
        return cls.from_column(read_column(dataset, client_id_column).to_numpy(), client_id_column)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def sizes(self) -> np.ndarray:
        """Rows of each client, int64 `[N]`. It costs N: for one client, take `len(index.shard(i))`."""
        return np.diff(self.offsets)

    def shard(self, i: int) -> np.ndarray:
        """Rows of the client with the i-th smallest id, int64 `[size]`, ascending (a read-only view, at no cost)."""
        if not 0 <= i < len(self):
            raise IndexError(
                f"Expected the position of a client from 0 to {len(self) - 1}, found {i}: count by ascending id."
            )
        return self.rows[self.offsets[i] : self.offsets[i + 1]]


def read_column(dataset: Dataset, name: str) -> pa.ChunkedArray:
    """A column of a data set as Arrow holds it, whatever the data set's format; ValueError where there is none."""
    if name not in dataset.column_names:
        raise ValueError(
            f"Expected a column {name!r} in the data set, found {dataset.column_names}: "
            "name an existing column or add this one."
        )
    return dataset.select_columns([name]).with_format("arrow")[:][name]


def as_client_ids(column: np.ndarray, name: str) -> np.ndarray:
    """The column as int64 `[M]`; ValueError where it is empty, has more than one axis or holds anything else."""
    column = np.asarray(column)
    if column.ndim != 1 or not len(column):
        raise ValueError(
            f"Expected one id in {name!r} for each row, found shape {column.shape}: give a data set with rows."
        )
    if column.dtype.kind in "fO":
        null = np.isnan(column) if column.dtype.kind == "f" else np.array([value is None for value in column])
        if null.any():
            raise ValueError(
                f"Expected an integer in {name!r} in every row, found none in {null.sum()} of {len(column)} rows, "
                f"the first being row {null.argmax()}: drop these rows or give them a client."
            )
    if column.dtype.kind not in "iu":
        raise ValueError(
            f"Expected integers in {name!r}, found {column.dtype} ({column[0]!r} in row 0): cast the column to int64, "
            "or number its values with partition(dataset, 'column', column=...)."
        )
    if column.dtype == np.uint64 and column.max() > np.iinfo(np.int64).max:
        raise ValueError(f"Expected ids below 2**63 in {name!r}, found {column.max()}: number the clients anew.")
    return column.astype(np.int64)
