"""Law 5 and the first part of law 7: a sketch is unbiased and uniform, and at full rank it is nothing at all.

Law 5  lift(restrict(.)) with scale r/k averages to the identity over all subsets
Law 7  fslora at full rank equals fedit
"""

from itertools import combinations

import numpy as np
import pytest
import torch

from fslora_hf.methods import sketch
from tests.support import reference
from tests.support.worker_train import build

R, IN, OUT = 5, 7, 4


def pair(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(R, IN, generator=generator, dtype=torch.float64),
        torch.randn(OUT, R, generator=generator, dtype=torch.float64),
    )


def subsets(k: int) -> list[np.ndarray]:
    return [np.array(chosen) for chosen in combinations(range(R), k)]


@pytest.mark.parametrize("k", range(1, R + 1))
def test_law_5_lift_of_restrict_averages_to_the_identity(k):
    a, b = pair()
    lifted = [sketch.lift(*sketch.restrict(a, b, chosen), chosen, R) for chosen in subsets(k)]
    mean_a, mean_b = (torch.stack(halves).mean(0) * R / k for halves in zip(*lifted, strict=True))
    torch.testing.assert_close(mean_a, a, rtol=0, atol=1e-14)
    torch.testing.assert_close(mean_b, b, rtol=0, atol=1e-14)


@pytest.mark.parametrize("k", range(1, R + 1))
def test_law_5_the_sketched_product_averages_to_the_product(k):
    """E[B S A] = B A, the form in which the paper uses it."""
    a, b = pair()
    products = [held_b @ held_a for held_a, held_b in (sketch.restrict(a, b, chosen) for chosen in subsets(k))]
    torch.testing.assert_close(torch.stack(products).mean(0) * R / k, b @ a, rtol=0, atol=1e-14)


def test_restrict_and_lift_name_the_same_rows_and_columns():
    a, b = pair()
    chosen = np.array([1, 4])
    held_a, held_b = sketch.restrict(a, b, chosen)
    assert torch.equal(held_a, a[[1, 4]]) and torch.equal(held_b, b[:, [1, 4]])
    held_a[:] = held_b[:] = 9.0  # a client's copy, not a view of the server's pair
    assert not (a == 9).any() and not (b == 9).any()
    back_a, back_b = sketch.lift(held_a, held_b, chosen, R)
    assert torch.equal(back_a, torch.tensor([0.0, 9, 0, 0, 9], dtype=a.dtype)[:, None].expand(R, IN))
    assert torch.equal(back_b, torch.tensor([0.0, 9, 0, 0, 9], dtype=b.dtype).expand(OUT, R))


VARIED = {
    "rounds": lambda i: (0, i, 7, "layers.0.q_proj"),
    "clients": lambda i: (0, 3, i * 10**9, "layers.0.q_proj"),
    "modules": lambda i: (0, 3, 7, f"layers.{i}.q_proj"),
    "seeds": lambda i: (i, 3, 7, "layers.0.q_proj"),
}


@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("varied", VARIED)
def test_draw_is_uniform_over_subsets(varied, k):
    """Pearson's statistic of 4000 draws over the C(5, k) subsets, whatever varies."""
    bound = {1: 23.5, 2: 33.7, 4: 23.5}[k]  # the 1 - 1e-4 quantiles of chi-square with 4, 9, 4 degrees of freedom
    counts = {tuple(chosen.tolist()): 0 for chosen in subsets(k)}
    for i in range(4000):
        drawn = np.asarray(sketch.draw(*VARIED[varied](i), R, k))
        assert drawn.dtype == np.int64
        counts[tuple(drawn.tolist())] += 1  # a KeyError here is an unsorted or repeated index
    observed = np.array(list(counts.values()))
    expected = observed.sum() / len(observed)
    assert ((observed - expected) ** 2 / expected).sum() < bound


def test_draws_of_two_modules_are_independent():
    """The same statistic on the 5 x 5 pairs that two modules of one client draw at k = 1 (24 degrees)."""
    counts = np.zeros((R, R))
    for t in range(4000):
        counts[int(sketch.draw(0, t, 7, "a", R, 1)[0]), int(sketch.draw(0, t, 7, "b", R, 1)[0])] += 1
    assert ((counts - 160) ** 2 / 160).sum() < 59.0


def test_law_7_fslora_at_full_rank_is_fedit(tmp_path):
    """Bit for bit: at k = r the sketch is everybody and its scale is one."""
    ends = {}
    for method in ("fslora", "fedit"):
        args = {"method": method, "num_rounds": 3, "local_steps": 2, "server_optim": "adam", "clients_per_round": 3}
        trainer = build(tmp_path / method, {"optim": "adamw_torch", **args, "per_device_train_clients": 2})
        start = reference.read_adapter(trainer.model)
        assert all(len(c.sketch(name)) == 6 == c.rank for c in trainer.round_plan(1).clients for name in start)
        trainer.train()
        ends[method] = reference.read_adapter(trainer.model)
    assert reference.max_difference(start, ends["fedit"]) > 1e-3
    assert reference.max_difference(ends["fslora"], ends["fedit"]) == 0
