"""Split one data set among clients: every scheme adds an integer `client_id` column and leaves the rows as they are.

A scheme is a pure function from what it looks at (the number of rows, or one label a row) to the client of each row,
int64 `[rows]`, so nothing can be lost or duplicated. What is random in it is a function of (seed, scheme, label).
`partition` checks the arguments; the schemes' own functions take them as they are.
"""

import math
from itertools import count
from numbers import Real

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

from ..common.draws import normals, uniforms
from ..common.settings import is_whole
from .clients import ClientIndex, as_client_ids, read_column

SCHEME_OPTIONS = {
    "iid": set(),
    "dirichlet": {"column", "alpha"},
    "task_dirichlet": {"column", "alpha"},
    "sorted_shards": {"column", "shards_per_client"},
    "column": {"column"},
}


def partition(
    dataset: Dataset,
    scheme: str,
    num_clients: int | None = None,
    *,
    seed: int,
    client_id_column: str = "client_id",
    column: str | None = None,
    alpha: float | None = None,
    shards_per_client: int | None = None,
    min_examples: int = 1,
) -> Dataset:
    """`dataset` with an int64 column `client_id_column` that gives each row to one client.

    Args:
        dataset: the rows to split; their order and their other columns stay.
        scheme: `iid`, `dirichlet`, `task_dirichlet`, `sorted_shards` or `column`: see the function of that name
            (`ids_from_column` for `column`).
        num_clients: clients to split among, ids 0 to num_clients - 1. The scheme `column` counts them itself; a number
            given with it must agree.
        seed: fixes the split. `column` draws nothing.
        column: the column with the label, task or author of a row, for every scheme but `iid`.
        alpha: concentration of the Dirichlet schemes; 0.1 if not given, as in the script of arXiv 2501.19389.
        shards_per_client: for `sorted_shards`; 2 if not given, as in arXiv 1602.05629.
        min_examples: fewest rows of a client. To clients that a draw leaves short, rows chosen by the seed move one by
            one from the client that is then the largest; under `column`, whose rows belong to someone, it is an error.

    Raises:
        TypeError: `dataset` is not a `datasets.Dataset`.
        ValueError: bad arguments, one line for each, or a column with nulls or of an unfit type.
    """
    if not isinstance(dataset, Dataset):
        raise TypeError(
            f"Expected a datasets.Dataset to split, found {type(dataset).__name__}: pass one split, held in full."
        )
    options = {"column": column, "alpha": alpha, "shards_per_client": shards_per_client}
    options = {name: value for name, value in options.items() if value is not None}
    problems = _option_problems(scheme, options)
    problems += _size_problems(len(dataset), scheme, num_clients, min_examples, options.get("shards_per_client", 2))
    problems += _place_problems(dataset, seed, client_id_column)
    if problems:
        raise ValueError("\n".join(problems))
    options.pop("column", None)
    if scheme == "column":
        clients = ids_from_column(dataset, column)
        _check_existing_clients(clients, column, num_clients, min_examples)
    elif scheme == "iid":
        clients = iid(len(dataset), num_clients, seed=seed)
    else:
        draw = {"dirichlet": dirichlet, "task_dirichlet": task_dirichlet, "sorted_shards": sorted_shards}[scheme]
        clients = draw(label_codes(dataset, column), num_clients, seed=seed, **options)
    if scheme != "column":  # whose rows belong to someone
        clients = _ensure_min_examples(clients, num_clients, min_examples, seed=seed)
    return dataset.add_column(client_id_column, clients)


def iid(num_rows: int, num_clients: int, *, seed: int) -> np.ndarray:
    """Shuffle the rows and deal them in turn: sizes differ by one at most (int64 `[num_rows]`)."""
    return _shuffled(num_rows, seed, "partition", "iid") % num_clients


def dirichlet(labels: np.ndarray, num_clients: int, *, seed: int, alpha: float = 0.1) -> np.ndarray:
    """Deal the rows of each label by proportions over the clients drawn from Dirichlet(alpha) (int64 `[rows]`).

    Small `alpha` gives most of a label to few clients, large `alpha` approaches equal parts (Yurochkin et al., arXiv
    1905.12022). `labels` is an integer array `[rows]`; a label's draw depends on the seed and its own number.
    """
    by_label = ClientIndex.from_column(labels, "label")
    clients = np.empty(len(labels), dtype=np.int64)
    for i, label in enumerate(by_label.ids.tolist()):
        rows = by_label.shard(i)
        clients[rows] = _dirichlet_deal(len(rows), num_clients, alpha, seed, "partition", "dirichlet", label)
    return clients


def task_dirichlet(tasks: np.ndarray, num_clients: int, *, seed: int, alpha: float = 0.1) -> np.ndarray:
    """The split published with arXiv 2501.19389: Dirichlet over tasks, evened out by the largest one (int64 `[rows]`).

    Every task but the largest is dealt as in `dirichlet`. The rows of the largest then fill the clients, smallest
    first, up to the average size `rows // num_clients`, until they run out: a client that is already larger gets none.
    `tasks` is an integer array `[rows]`; of equally large tasks the one with the smallest number fills.

    Two differences from the published script: the average leaves up to num_clients - 1 rows over, which it drops and
    we give one each to the smallest clients; rounding a task's proportions leaves rows over, which it gives to the
    last client and we to the largest remainders.
    """
    by_task = ClientIndex.from_column(tasks, "task")
    largest = int(by_task.sizes.argmax())
    clients = np.full(len(tasks), -1, dtype=np.int64)
    for i, task in enumerate(by_task.ids.tolist()):
        if i != largest:
            rows = by_task.shard(i)
            clients[rows] = _dirichlet_deal(len(rows), num_clients, alpha, seed, "partition", "task_dirichlet", task)
    rows = by_task.shard(largest)
    counts = _fill_counts(np.bincount(clients[clients >= 0], minlength=num_clients), len(rows))
    filling = np.repeat(np.arange(num_clients), counts)
    clients[rows] = filling[_shuffled(len(rows), seed, "partition", "task_dirichlet", "fill")]
    return clients


def sorted_shards(labels: np.ndarray, num_clients: int, *, seed: int, shards_per_client: int = 2) -> np.ndarray:
    """Sort the rows by label, cut them into equal shards, deal each client `shards_per_client` (int64 `[rows]`).

    The scheme of McMahan et al., arXiv 1602.05629. Shard sizes differ by one at most; rows of one label stay in order.
    """
    shards = num_clients * shards_per_client
    shard_of_sorted = np.arange(len(labels)) * shards // len(labels)
    clients = np.empty(len(labels), dtype=np.int64)
    owner = _shuffled(shards, seed, "partition", "sorted_shards") % num_clients
    clients[np.argsort(labels, kind="stable")] = owner[shard_of_sorted]
    return clients


def ids_from_column(dataset: Dataset, column: str) -> np.ndarray:
    """Client ids from a column that says who owns a row: integers as they are, else 0, 1, ... by sorted value."""
    values = read_column(dataset, column)
    if pa.types.is_integer(values.type):
        return as_client_ids(values.to_numpy(), column)
    return label_codes(dataset, column)


def label_codes(dataset: Dataset, column: str) -> np.ndarray:
    """The labels of a column of integers, booleans or text, numbered 0, 1, ... by sorted value (int64 `[rows]`)."""
    values = read_column(dataset, column)
    types = (pa.types.is_integer, pa.types.is_boolean, pa.types.is_string, pa.types.is_large_string)
    if not any(fits(values.type) for fits in types):
        raise ValueError(
            f"Expected integers, booleans or text in column {column!r} to split by, found {values.type}: "
            "name a column of labels or make one."
        )
    if values.null_count:
        raise ValueError(
            f"Expected a value in every row of column {column!r} to split by, found {values.null_count} rows without: "
            "fill or drop them."
        )
    by_value = pa.array(sorted(values.unique().to_pylist()), type=values.type)
    return pc.index_in(values, by_value).to_numpy().astype(np.int64)


def _ensure_min_examples(clients: np.ndarray, num_clients: int, min_examples: int, *, seed: int) -> np.ndarray:
    """`clients` (int64 `[rows]`, at least `num_clients * min_examples`) with the rows moved that the short ones lack.

    As if one row at a time went from the client that is then the largest (of equals, the one with the smallest id):
    the largest are levelled, none falls short. Which rows go is drawn by the seed, lest they all be of one label.
    """
    sizes = np.bincount(clients, minlength=num_clients)
    lacking = np.maximum(min_examples - sizes, 0)
    given = _surplus(sizes, int(lacking.sum()))
    order = np.lexsort((uniforms(len(clients), seed, "partition", "move"), clients))
    place = np.arange(len(clients)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    moved = order[place < np.repeat(given, sizes)]
    mended = clients.copy()
    mended[moved] = np.repeat(np.arange(num_clients), lacking)
    return mended


def _option_problems(scheme: str, options: dict) -> list[str]:
    """One sentence for each option given (not None) that the scheme does not take, lacks or cannot use."""
    if scheme not in SCHEME_OPTIONS:
        return [f"Expected a scheme of {list(SCHEME_OPTIONS)}, found {scheme!r}: choose one of them."]
    problems = [
        f"Expected no {name} for the scheme {scheme!r}, found {options[name]!r}: leave it out."
        for name in sorted(options.keys() - SCHEME_OPTIONS[scheme])
    ]
    if "column" in SCHEME_OPTIONS[scheme] and "column" not in options:
        problems.append(f"Expected column= for the scheme {scheme!r}, found none: name the column to split by.")
    alpha = options.get("alpha", 0.1)
    if isinstance(alpha, bool) or not isinstance(alpha, Real) or not 1e-6 <= alpha <= 1e6:
        problems.append(f"Expected alpha from 1e-6 to 1e6, found {alpha!r}: for an even split, use the scheme 'iid'.")
    return problems


def _size_problems(
    num_rows: int, scheme: str, num_clients: int | None, min_examples: int, shards_per_client: int
) -> list[str]:
    """One sentence for each count that is no positive integer, or one if the rows do not suffice."""
    counts = {"min_examples": min_examples, "shards_per_client": shards_per_client}
    if scheme != "column" or num_clients is not None:
        counts["num_clients"] = num_clients
    problems = [
        f"Expected {name} to be an integer of 1 or more, found {value!r}: set it."
        for name, value in counts.items()
        if not (is_whole(value) and value >= 1)
    ]
    if problems or scheme == "column":
        return problems
    needed = num_clients * min_examples
    least = max(needed, num_clients * shards_per_client) if scheme == "sorted_shards" else needed
    if num_rows < least:
        problems.append(
            f"Expected at least {least} rows, {least // num_clients} for each of {num_clients} clients, "
            f"found {num_rows}: lower num_clients or {'shards_per_client' if least > needed else 'min_examples'}."
        )
    return problems


def _place_problems(dataset: Dataset, seed: int, client_id_column: str) -> list[str]:
    """One sentence for a seed that is no integer, and one if the data set has the column that is to be added."""
    problems = [] if is_whole(seed) else [f"Expected seed to be an integer, found {seed!r}: set it."]
    if client_id_column in dataset.column_names:
        problems.append(
            f"Expected no column {client_id_column!r} in the data set yet, found one: train on it as it is, "
            "remove it first, or name another client_id_column."
        )
    return problems


def _check_existing_clients(clients: np.ndarray, column: str, num_clients: int | None, min_examples: int) -> None:
    """ValueError where a column's clients are not `num_clients` or one of them has fewer than `min_examples` rows."""
    index = ClientIndex.from_column(clients, column)
    if num_clients not in (None, len(index)):
        raise ValueError(
            f"Expected {num_clients} clients, found {len(index)} values in column {column!r}: leave num_clients out."
        )
    small = np.flatnonzero(index.sizes < min_examples)
    if len(small):
        raise ValueError(
            f"Expected at least {min_examples} rows of each client, found {index.sizes[small[0]]} of client "
            f"{index.ids[small[0]]} ({len(small)} such clients): drop their rows or lower min_examples."
        )


def _surplus(sizes: np.ndarray, total: int) -> np.ndarray:
    """How many rows each client gives (int64 `[N]`) if `total` rows are taken one by one from the then largest."""
    low, high = 0, int(sizes.max())  # the highest level above which there are at least `total` rows
    while low < high:
        level = (low + high + 1) // 2
        low, high = (level, high) if np.maximum(sizes - level, 0).sum() >= total else (low, level - 1)
    given = np.maximum(sizes - low, 0)
    givers = np.flatnonzero(given)
    given[givers[len(givers) - (given.sum() - total) :]] -= 1
    return given


def _fill_counts(sizes: np.ndarray, supply: int) -> np.ndarray:
    """Rows of the filling task for each client (int64 `[N]`), smallest client first, up to the average size."""
    target = (int(sizes.sum()) + supply) // len(sizes)
    order = np.argsort(sizes, kind="stable")
    counts = np.empty_like(sizes)
    counts[order] = np.diff(np.minimum(np.cumsum(np.maximum(target - sizes[order], 0)), supply), prepend=0)
    counts[np.argsort(sizes + counts, kind="stable")[: supply - counts.sum()]] += 1
    return counts


def _dirichlet_deal(num_rows: int, num_clients: int, alpha: float, *path: int | str) -> np.ndarray:
    """The client of each of `num_rows` like rows (int64 `[num_rows]`), counts by Dirichlet(alpha) proportions."""
    logs = log_gammas(num_clients, alpha, *path, "shares")
    shares = np.exp(logs - logs.max())
    shares *= num_rows / shares.sum()
    counts = np.floor(shares).astype(np.int64)
    by_remainder = np.argsort(counts - shares, kind="stable")
    counts[by_remainder[: num_rows - counts.sum()]] += 1
    return np.repeat(np.arange(num_clients), counts)[_shuffled(num_rows, *path, "rows")]


def log_gammas(n: int, alpha: float, *path: int | str) -> np.ndarray:
    """Logarithms of `n` Gamma(alpha, 1) draws, a pure function of `path` (float64 `[n]`).

    Marsaglia and Tsang (2000), with G(alpha) = G(alpha + 1) * U**(1 / alpha). Not numpy's draws, which may change with
    its version; and in logarithms, because at small alpha they underflow.
    """
    d = alpha + 1 - 1 / 3
    logs = np.log1p(-uniforms(n, *path, "boost")) / alpha
    pending = np.arange(n)
    for attempt in count():
        x = normals(len(pending), *path, "normal", attempt)
        u = 1.0 - uniforms(len(pending), *path, "accept", attempt)
        v = np.maximum(1 + x / math.sqrt(9 * d), 1e-100) ** 3
        accepted = np.log(u) < x * x / 2 + d * (1 - v + np.log(v))
        logs[pending[accepted]] += math.log(d) + np.log(v[accepted])
        pending = pending[~accepted]
        if not len(pending):
            return logs


def _shuffled(n: int, *path: int | str) -> np.ndarray:
    """A random permutation of `range(n)` (int64 `[n]`), in vectorised time, for draws that touch every row anyway."""
    return np.argsort(uniforms(n, *path), kind="stable")
