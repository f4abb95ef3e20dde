"""What a round does, as a pure function of (seed, round): who takes part, with which sketches, on which examples."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from ..common.draws import permutation_prefix, uniforms
from ..data.clients import ClientIndex
from ..methods.sketch import draw


@dataclass(frozen=True)
class ClientPlan:
    """One client's part in a round.

    Attributes:
        client_id: the client's id in the data set's client column.
        rank: the rank k it trains.
        weight: its share of the round's average; the shares of a cohort sum to 1.
        example_ids: int64 `[local_steps, examples a step]`, rows of the training data set.
        participation: the share of rounds that it takes part in, in the mean.
        cohort_rank: the sum of the ranks in its round.
    """

    client_id: int
    rank: int
    weight: float
    example_ids: np.ndarray
    draw_sketch: Callable[[str], np.ndarray]
    draw_uniforms: Callable[[int, str], np.ndarray]
    participation: float
    cohort_rank: int

    def sketch(self, module_name: str) -> np.ndarray:
        """Sorted int64 indices `[rank]` of the rows of A and columns of B that the client trains in this module."""
        return self.draw_sketch(module_name)

    def fresh_rows(self, module_name: str, features: int) -> np.ndarray:
        """Rows of a new A for this client and round, float64 `[rank, features]`: uniform on +-1/sqrt(features), as
        PEFT draws them."""
        drawn = self.draw_uniforms(self.rank * features, module_name).reshape(self.rank, features)
        return (2.0 * drawn - 1.0) / math.sqrt(features)


@dataclass(frozen=True)
class RoundPlan:
    """One round: its number from 0, the learning rate of all its local steps, and the cohort by ascending id."""

    round: int
    learning_rate: float
    clients: tuple[ClientPlan, ...]


def plan_round(
    round: int,
    *,
    seed: int,
    index: ClientIndex,
    ranks: np.ndarray,
    global_rank: int,
    clients_per_round: int,
    local_steps: int,
    examples_per_step: int,
    learning_rate: Callable[[int], float],
    sketch_scope: str = "module",
    client_weighting: str = "uniform",
    data_seed: int | None = None,
) -> RoundPlan:
    """Plan one round. Costs what its cohort costs, whatever the number of clients and of rounds before it.

    Args:
        round: from 0; any round may be asked for at any time.
        seed: of the run; `data_seed`, if given, is used for the order of examples instead.
        index: which rows of the data set each client holds.
        ranks: int64 `[clients]`, the rank each client affords.
        global_rank: r, the rank of the global adapter.
        clients_per_round: the cohort's size, drawn uniformly without replacement.
        local_steps, examples_per_step: the shape of each client's `example_ids`.
        learning_rate: the rate of a round.
        sketch_scope: `module` (a sketch a module) or `model` (one sketch for all modules of a client).
        client_weighting: `uniform`, or `num_examples` (weights in proportion to the size of the clients' shards).
    """
    if round < 0:
        raise ValueError(f"Expected a round from 0 on, found {round}.")
    cohort = np.sort(permutation_prefix(len(index), clients_per_round, seed, "cohort", round))
    # From the cohort's own offsets: index.sizes would cost the whole population.
    sizes = index.offsets[cohort + 1] - index.offsets[cohort]
    sizes = sizes if client_weighting == "num_examples" else np.ones(len(cohort))
    weights = sizes / sizes.sum()
    examples = partial(_draw_examples, data_seed if data_seed is not None else seed, round)
    cohort_rank = int(ranks[cohort].sum())
    clients = []
    for position, weight in zip(cohort.tolist(), weights.tolist(), strict=True):
        client_id, rank = int(index.ids[position]), int(ranks[position])
        rows = examples(client_id, index.shard(position), local_steps * examples_per_step)
        sketch = partial(_draw_sketch, seed, round, client_id, global_rank, rank, sketch_scope)
        rows = rows.reshape(local_steps, examples_per_step)
        fresh = partial(_draw_uniforms, seed, round, client_id)
        share = clients_per_round / len(index)
        clients.append(ClientPlan(client_id, rank, weight, rows, sketch, fresh, share, cohort_rank))
    return RoundPlan(round, learning_rate(round), tuple(clients))


def _draw_examples(seed: int, round: int, client_id: int, shard: np.ndarray, count: int) -> np.ndarray:
    """`count` rows read off permutations of the shard, a new one whenever the last is exhausted (int64 `[count]`)."""
    parts = []
    for turn, start in enumerate(range(0, count, len(shard))):
        wanted = min(len(shard), count - start)
        parts.append(shard[permutation_prefix(len(shard), wanted, seed, "examples", round, client_id, turn)])
    rows = np.concatenate(parts)
    rows.flags.writeable = False  # plans are kept and shared
    return rows


def _draw_sketch(
    seed: int, round: int, client_id: int, global_rank: int, rank: int, scope: str, module_name: str
) -> np.ndarray:
    if rank == global_rank:
        return np.arange(global_rank, dtype=np.int64)
    return draw(seed, round, client_id, module_name if scope == "module" else "", global_rank, rank)


def _draw_uniforms(seed: int, round: int, client_id: int, n: int, module_name: str) -> np.ndarray:
    return uniforms(n, seed, "fresh rows", round, client_id, module_name)
