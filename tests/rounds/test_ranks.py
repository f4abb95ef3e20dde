"""The rank laws against a slow twin and their exact distributions."""

import hashlib
import math
import re

import numpy as np
import pytest

from fslora_hf.common.draws import normals
from fslora_hf.rounds.ranks import RANK_LAWS, client_ranks


def slow_ranks(n: int, law: str, low: int, high: int, seed: int) -> list[int]:
    """The rank laws with loops, `math` and `hashlib` only, the published mu of `heavy_tail_low` included."""
    bits = hashlib.shake_256(f"{seed}/rank".encode()).digest(16 * n)
    u = [(int.from_bytes(bits[8 * i : 8 * i + 8], "little") >> 11) / 2**53 for i in range(2 * n)]
    z = [math.sqrt(-2 * math.log1p(-u[2 * i])) * math.cos(2 * math.pi * u[2 * i + 1]) for i in range(n)]
    tail = [1 / math.exp(math.log((low + high) / 4) + z[i]) for i in range(n)]
    samples = {
        "homogeneous": [high] * n,
        "uniform": [low + (high - low) * u[i] for i in range(n)],
        "normal": [(low + high) / 2 + (high - low) / 6 * z[i] for i in range(n)],
        "heavy_tail_low": [low + (t - min(tail)) / (max(tail) - min(tail)) * (high - low) for t in tail],
    }[law]
    return [round(min(max(sample, low), high)) for sample in samples]


@pytest.mark.parametrize("law", RANK_LAWS)
@pytest.mark.parametrize("n, low, high, seed", [(50, 1, 32, 0), (200, 8, 8, 1), (300, 4, 64, -3)])
def test_ranks_equal_the_slow_twin(law, n, low, high, seed):
    ranks = client_ranks(n, law=law, min_rank=low, max_rank=high, seed=seed)
    assert ranks.dtype == np.int64
    assert ranks.tolist() == slow_ranks(n, law, low, high, seed)


@pytest.mark.parametrize(
    "law, golden",
    [  # made by slow_ranks(12, law, 1, 32, 0), which shares no code with the package
        ("homogeneous", [32] * 12),
        ("uniform", [32, 28, 25, 21, 29, 13, 14, 30, 15, 29, 22, 23]),
        ("normal", [29, 11, 8, 22, 21, 14, 12, 15, 24, 13, 15, 16]),
        ("heavy_tail_low", [1, 20, 32, 3, 3, 10, 16, 9, 2, 13, 9, 7]),
    ],
)
def test_ranks_never_change(law, golden):
    assert client_ranks(12, law=law, min_rank=1, max_rank=32, seed=0).tolist() == golden
    assert slow_ranks(12, law, 1, 32, 0) == golden


def _normal_cdf(x: float) -> float:
    return (1 + math.erf(x / math.sqrt(2))) / 2


@pytest.mark.parametrize("law", ["uniform", "normal"])
def test_ranks_follow_their_law(law):
    """Each rank's count within 5 standard deviations of its exact probability, clipping at the ends included."""
    n, low, high = 200_000, 1, 9
    cdf = {
        "uniform": lambda x: (x - low) / (high - low),
        "normal": lambda x: _normal_cdf((x - (low + high) / 2) / ((high - low) / 6)),
    }[law]
    counts = np.bincount(client_ranks(n, law=law, min_rank=low, max_rank=high, seed=7), minlength=high + 1)
    for rank in range(low, high + 1):
        below = cdf(rank - 0.5) if rank > low else 0.0
        above = cdf(rank + 0.5) if rank < high else 1.0
        p = above - below
        assert abs(counts[rank] - n * p) < 5 * math.sqrt(n * p * (1 - p)), rank
    assert counts.sum() == n and counts[:low].sum() == 0


@pytest.mark.parametrize("law", ["homogeneous", "uniform", "normal"])
def test_more_clients_do_not_change_the_first_ones(law):
    few, many = (client_ranks(n, law=law, min_rank=1, max_rank=32, seed=5) for n in (17, 1000))
    assert few.tolist() == many[:17].tolist()


def test_heavy_tail_low_reaches_both_bounds_and_is_mostly_low():
    ranks = client_ranks(50, law="heavy_tail_low", min_rank=1, max_rank=32, seed=1)
    assert (ranks.min(), ranks.max()) == (1, 32)
    assert np.median(ranks) < 10
    more = client_ranks(500, law="heavy_tail_low", min_rank=1, max_rank=32, seed=1)
    assert more[:50].tolist() != ranks.tolist()  # scaled over all clients, as documented


@pytest.mark.parametrize("law, rank", [("homogeneous", 16), ("heavy_tail_low", 2)])
def test_one_client_gets_a_rank(law, rank):
    assert client_ranks(1, law=law, min_rank=2, max_rank=16, seed=0).tolist() == [rank]


@pytest.mark.parametrize("law", ["uniform", "normal", "heavy_tail_low"])
def test_seeds_give_different_ranks(law):
    one, other = (client_ranks(40, law=law, min_rank=1, max_rank=32, seed=seed).tolist() for seed in (1, 2))
    assert one != other


@pytest.mark.parametrize(
    "change, message",
    [
        ({"num_clients": 0}, "Expected num_clients to be an integer of 1 or more, found 0: set it."),
        ({"num_clients": 2.0}, "Expected num_clients to be an integer of 1 or more, found 2.0: set it."),
        (
            {"law": "zipf"},
            "Expected a rank law of ['homogeneous', 'uniform', 'normal', 'heavy_tail_low'], found 'zipf'",
        ),
        ({"min_rank": 0}, "Expected integers with 1 <= min_rank <= max_rank, found min_rank=0 and max_rank=8"),
        ({"min_rank": 9}, "Expected integers with 1 <= min_rank <= max_rank, found min_rank=9 and max_rank=8"),
        ({"max_rank": 8.5}, "Expected integers with 1 <= min_rank <= max_rank, found min_rank=1 and max_rank=8.5"),
        ({"max_rank": None}, "Expected integers with 1 <= min_rank <= max_rank, found min_rank=1 and max_rank=None"),
    ],
)
def test_ranks_say_what_is_wrong(change, message):
    arguments = {"num_clients": 4, "law": "uniform", "min_rank": 1, "max_rank": 8, "seed": 0} | change
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        client_ranks(**arguments)
    assert "\n" not in str(error.value)


def test_ranks_say_all_that_is_wrong_at_once():
    with pytest.raises(ValueError) as error:
        client_ranks(0, law="zipf", min_rank=0, max_rank=8, seed=0)
    assert len(str(error.value).splitlines()) == 3


def test_normals_are_normal_and_begin_with_shorter_ones():
    z = normals(200_000, 3, "z")
    assert normals(10, 3, "z").tolist() == z[:10].tolist()
    # Standard errors: sqrt(1 / n), sqrt(2 / n), sqrt(96 / n); then Kolmogorov's statistic at probability 1e-6.
    assert abs(z.mean()) < 5 * math.sqrt(1 / len(z))
    assert abs((z**2).mean() - 1) < 5 * math.sqrt(2 / len(z))
    assert abs((z**4).mean() - 3) < 5 * math.sqrt(96 / len(z))
    cdf = np.array([_normal_cdf(x) for x in np.sort(z).tolist()])
    assert np.abs(cdf - (np.arange(len(z)) + 0.5) / len(z)).max() < math.sqrt(-0.5 * math.log(5e-7) / len(z))
