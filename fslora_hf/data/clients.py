"""Who the clients are: which rows of the data set each one owns, and which rank each one affords.

Both are arrays, never one object a client, so that a million clients cost a few megabytes and a fraction of a second.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from datasets import Dataset

from ..common.draws import uniforms


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


def is_whole(value: object) -> bool:
    """Whether `value` is an integer, Python's or numpy's; a truth value is none."""
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def normals(n: int, *path: int | str) -> np.ndarray:
    """`n` standard normal draws by Box and Muller, a pure function of `path` (float64 array `[n]`).

    Draw i uses the uniforms 2i and 2i + 1 of the path, so that a longer array begins with the shorter one.
    """
    radius, angle = uniforms(2 * n, *path).reshape(n, 2).T
    return np.sqrt(-2.0 * np.log1p(-radius)) * np.cos(2.0 * np.pi * angle)


def _homogeneous(n: int, low: int, high: int, seed: int) -> np.ndarray:
    return np.full(n, float(high))


def _uniform(n: int, low: int, high: int, seed: int) -> np.ndarray:
    return low + (high - low) * uniforms(n, seed, "rank")


def _normal(n: int, low: int, high: int, seed: int) -> np.ndarray:
    return (low + high) / 2 + (high - low) / 6 * normals(n, seed, "rank")


def _heavy_tail_low(n: int, low: int, high: int, seed: int) -> np.ndarray:
    # The published mu, ln((low + high) / 4), multiplies every draw by one factor, which the scaling takes out again.
    tail = np.exp(-normals(n, seed, "rank"))
    spread = np.ptp(tail)
    return low + (high - low) * ((tail - tail.min()) / spread if spread else np.zeros(n))


RANK_LAWS: dict[str, Callable[[int, int, int, int], np.ndarray]] = {
    "homogeneous": _homogeneous,
    "uniform": _uniform,
    "normal": _normal,
    "heavy_tail_low": _heavy_tail_low,
}


def client_ranks(num_clients: int, *, law: str, min_rank: int, max_rank: int, seed: int) -> np.ndarray:
    """The rank each client affords, int64 `[num_clients]` within `[min_rank, max_rank]`; entry i is the i-th client's.

    The laws are those of the script published with arXiv 2501.19389, clipped to the bounds a..b and rounded:

    - `homogeneous`: b for all;
    - `uniform`: U(a, b), so that a and b themselves are half as likely as the ranks between them;
    - `normal`: mean (a + b) / 2, standard deviation (b - a) / 6;
    - `heavy_tail_low`: 1 / LogNormal(mu, 1), scaled so that the least draw is a and the greatest is b: many low ranks
      and a few high ones, the fewer the more clients there are. Where all draws are equal (one client) all get a.

    A rank is a function of (seed, i), and of (a, b): more clients do not change the ranks of the first ones. Only
    `heavy_tail_low` scales over all clients, so that there every rank depends on their number.

    Raises ValueError, one line for each problem.
    """
    problems = []
    if not (is_whole(num_clients) and num_clients >= 1):
        problems.append(f"Expected num_clients to be an integer of 1 or more, found {num_clients!r}: set it.")
    if law not in RANK_LAWS:
        problems.append(f"Expected a rank law of {list(RANK_LAWS)}, found {law!r}: choose one of them.")
    if not (is_whole(min_rank) and is_whole(max_rank) and 1 <= min_rank <= max_rank):
        problems.append(
            "Expected integers with 1 <= min_rank <= max_rank, "
            f"found min_rank={min_rank!r} and max_rank={max_rank!r}: set the bounds."
        )
    if problems:
        raise ValueError("\n".join(problems))
    ranks = RANK_LAWS[law](num_clients, min_rank, max_rank, seed)
    return np.rint(np.clip(ranks, min_rank, max_rank)).astype(np.int64)
