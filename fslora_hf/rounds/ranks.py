"""Rank laws: which rank each client affords, as an array, a function of the seed and the client's number."""

from collections.abc import Callable

import numpy as np

from ..common.draws import normals, uniforms
from ..common.settings import is_whole


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
