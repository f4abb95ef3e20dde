"""Federated sketching on least squares, where optimum, mean and second moment of every round are known exactly.

The formulas are held against enumeration of all sketches, the package's own rounds against the formulas.
"""

import json
import sys
from itertools import combinations, product
from pathlib import Path
from types import SimpleNamespace

import convergence
import least_squares
import numpy as np
import pytest
import torch

from fslora_hf.methods.fslora import FSLoRA
from fslora_hf.rounds.server import ServerState

ROOT = Path(__file__).resolve().parents[2]
MODULE = convergence.MODULE
ERRORS = 5.0  # standard errors; the seeds are fixed, so that a test that passes keeps passing


def subsets(r: int, k: int) -> list[np.ndarray]:
    return [np.array(chosen) for chosen in combinations(range(r), k)]


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize("k", range(1, 6))
def test_moments_of_a_sketch_equal_enumeration(order, k):
    r, letters = 5, "abcd"[:order]
    diagonals = torch.zeros(len(subsets(r, k)), r, dtype=torch.float64)
    for diagonal, chosen in zip(diagonals, subsets(r, k), strict=True):
        diagonal[chosen] = r / k
    terms = ",".join(f"n{letter}" for letter in letters)
    mean = torch.einsum(f"{terms}->n{letters}", *[diagonals] * order).mean(0)
    torch.testing.assert_close(least_squares.inclusion(r, k, order), mean, rtol=1e-13, atol=1e-13)


def changes_of_all_sketches(problem, ranks: list[int], B: torch.Tensor, rate: float) -> torch.Tensor:
    """The change of B in a round of the package, for every way to draw the clients' sketches."""
    changes = []
    for drawn in product(*(subsets(problem.rank, k) for k in ranks)):
        server = ServerState({MODULE: problem.A.clone()}, {MODULE: B.clone()})
        clients = [
            SimpleNamespace(rank=k, weight=w, sketch=lambda module, one=one: one)
            for k, w, one in zip(ranks, problem.weights, drawn, strict=True)
        ]
        convergence.take_round(FSLoRA(), server, clients, problem, rate)
        assert torch.equal(server.A[MODULE], problem.A)
        changes.append(server.B[MODULE] - B)
    return torch.stack(changes)


@pytest.mark.parametrize("ranks", [[1, 1], [2, 2], [1, 3], [4, 2], [4, 4]], ids=str)
def test_the_law_of_a_round_equals_enumeration(ranks):
    """Mean and second moment of one round of the package, over all the sketches that two clients can draw."""
    problem, rate = least_squares.make_problem(4, 2), 0.1
    law, B = least_squares.Law(problem, ranks), randn(6, 4)
    changes = changes_of_all_sketches(problem, ranks, B, rate)
    mean, second = law.step(B, B.mT @ B, rate)
    torch.testing.assert_close((B + changes).mean(0), mean, rtol=0, atol=1e-12)
    torch.testing.assert_close(((B + changes).mT @ (B + changes)).mean(0), second, rtol=0, atol=1e-11)
    spread = ((B + changes) - mean).square().sum((1, 2)).mean()
    assert (spread > 1e-2) == (ranks != [4, 4])  # there is something to be right about


@pytest.mark.parametrize("ranks", [[1, 1], [2, 3]], ids=str)
def test_the_optimum_is_where_rounds_stand_still_in_the_mean(ranks):
    problem = least_squares.make_problem(4, 2)
    optimum = least_squares.Law(problem, ranks).optimum
    changes = changes_of_all_sketches(problem, ranks, optimum, 1.0)
    assert changes.mean(0).abs().max() < 1e-12 < 1e-2 < changes.abs().max()
    plain = least_squares.Law(problem, [4, 4]).optimum
    assert (optimum - plain).abs().max() > 0.1  # the sketched objective is another than the plain one


def errors(samples: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """How many standard errors the mean of `samples [runs, ...]` is off."""
    return (samples.mean(0) - expected).abs() / (samples.std(0) / len(samples) ** 0.5)


@pytest.fixture(scope="module")
def mixed():
    """100 runs with clients of ranks 2, 2, 2 and 8 of 8: (law, step size, B `[runs, 31, out, r]`)."""
    problem, ranks, rate = least_squares.make_problem(8, 4), [2, 2, 2, 8], 0.04
    law = least_squares.Law(problem, ranks)
    runs = [convergence.simulate(problem, ranks, rate, 30, seed)[0] for seed in range(100)]
    return law, rate, torch.stack(runs)


@pytest.mark.slow
def test_the_mean_of_many_runs_follows_the_recursion(mixed):
    law, rate, runs = mixed
    means = torch.stack([mean for mean, _ in law.moments(rate, 30)])
    assert errors(runs[:, 1:], means[1:]).max() < ERRORS
    closed = law.optimum - law.optimum @ torch.linalg.matrix_power(torch.eye(8).double() - rate * law.hessian, 30)
    torch.testing.assert_close(means[30], closed, rtol=0, atol=1e-12)


@pytest.mark.slow
def test_the_suboptimality_of_many_runs_follows_the_recursion(mixed):
    """The second moment, noise of independent sketches included."""
    law, rate, runs = mixed
    expected = torch.stack([law.expected_excess(*state) for state in law.moments(rate, 30)])
    assert errors(law.excess(runs)[:, 1:], expected[1:]).max() < ERRORS
    noiseless = law.excess(torch.stack([mean for mean, _ in law.moments(rate, 30)]))
    assert errors(law.excess(runs)[:, 30], noiseless[30]) > 2 * ERRORS  # the noise is seen


def test_without_sketching_rounds_are_gradient_descent():
    problem = least_squares.make_problem(8, 3)
    law, rate = least_squares.Law(problem, [8] * 3), least_squares.safe_rate(problem, [8] * 3)
    path, _ = convergence.simulate(problem, [8] * 3, rate, 60, seed=0)
    torch.testing.assert_close(path, torch.stack([mean for mean, _ in law.moments(rate, 60)]), rtol=0, atol=1e-12)
    assert law.excess(path[-1]) < 1e-4 * law.excess(path[0])


@pytest.fixture(scope="module")
def shares():
    """The script's measurement at k/r = 1/8, 1/4, 1/2, 1, in few runs."""
    problem = least_squares.make_problem(8, 4)
    return problem, [convergence.measure(problem, k, 25 * 8 // k, 8, 0.01) for k in (1, 2, 4, 8)]


@pytest.mark.slow
def test_rounds_fall_as_the_share_grows_and_as_predicted(shares):
    _, rows = shares
    measured, predicted = ([row[f"rounds_{kind}"] for row in rows] for kind in ("measured", "predicted"))
    assert measured == sorted(measured, reverse=True) and len(set(measured)) == 4
    for row, one, other in zip(rows, measured, predicted, strict=True):
        assert abs(one - other) <= max(1, 0.08 * other), row["ratio"]
        assert one <= measured[-1] / row["ratio"]  # at most r/k times those of k = r
    assert measured[0] > 3 * measured[-1]


@pytest.mark.slow
def test_a_smaller_share_contracts_more_slowly_and_no_slower_than_theory_says(shares):
    problem, rows = shares
    plain = sum(w * G for w, G in zip(problem.weights, problem.grams, strict=True))
    smallest = torch.linalg.eigvalsh(plain)[0].item()
    contractions = [row["contraction"] for row in rows]
    assert contractions == sorted(contractions, reverse=True)
    for row in rows:
        assert row["curvature"][0] >= smallest / row["ratio"] * (1 - 1e-12)
        assert row["contraction"] <= 1 - row["ratio"] * smallest * rows[-1]["step_size"] + 1e-12


@pytest.mark.slow
def test_bytes_to_the_same_suboptimality_are_those_of_the_rounds(shares):
    problem, rows = shares
    for row in rows:
        width = problem.A.shape[1] + 6
        assert row["bytes_up_a_round"] == 4 * row["k"] * width * 8
        assert row["bytes_up"] == row["bytes_up_a_round"] * row["rounds_measured"]


@pytest.mark.slow
@pytest.mark.parametrize("k", [1, 2, 4])
def test_the_bound_holds_at_the_step_size_of_theory(k):
    problem = least_squares.make_problem(8, 4)
    law, rate = least_squares.Law(problem, [k] * 4), least_squares.safe_rate(problem, [k] * 4)
    runs = torch.stack([convergence.simulate(problem, [k] * 4, rate, 60, seed)[0] for seed in range(4)])
    distance = (runs - law.optimum).square().sum((-2, -1)).mean(0)
    assert (distance <= law.bound(rate, 60) * (1 + 1e-9)).all()


@pytest.mark.slow
def test_the_noise_floor_is_where_runs_end_and_in_proportion_to_the_step():
    problem, ranks, rate = least_squares.make_problem(4, 2), [2, 2], 0.1
    law = least_squares.Law(problem, ranks)
    ends = torch.stack([law.excess(convergence.simulate(problem, ranks, rate, 50, s)[0][-1]) for s in range(100)])
    assert errors(ends, law.floor(rate)) < ERRORS and law.floor(rate) > 0
    for step in (rate / 8, rate / 16):
        assert law.floor(step / 2) / law.floor(step) == pytest.approx(0.5, rel=0.05)


def test_the_script_writes_what_it_measured(tmp_path, monkeypatch):
    output = tmp_path / "out" / "convergence.json"
    command = "convergence.py --rank 2 --clients 2 --rounds 30 --seeds 2 --epsilon 0.1 --output"
    monkeypatch.setattr(sys, "argv", [*command.split(), str(output)])
    convergence.main()
    result = json.loads(output.read_text())
    assert [row["ratio"] for row in result["results"]] == [0.5, 1] and set(result["versions"]) > {"torch", "python"}
    for row in result["results"]:
        assert row["curve_rounds"][0] == 0 and row["curve_rounds"][-1] == 30
        assert row["curve_measured"][0] == pytest.approx(1) and len(row["curve_measured"]) == len(row["curve_rounds"])
    assert output.with_suffix(".png").stat().st_size > 5_000


def test_a_suboptimality_that_is_not_reached_is_drawn_without_it(tmp_path, monkeypatch, capsys):
    output = tmp_path / "convergence.json"
    command = "convergence.py --rank 2 --clients 2 --rounds 4 --seeds 2 --epsilon 1e-9 --output"
    monkeypatch.setattr(sys, "argv", [*command.split(), str(output)])
    convergence.main()
    assert capsys.readouterr().out.count("not reached") == 2
    assert json.loads(output.read_text())["results"][0]["rounds_measured"] is None
    assert output.with_suffix(".png").exists()


def test_the_published_numbers_are_of_this_code():
    """The prediction of docs/benchmarks/convergence.json, made by the script with its defaults."""
    published = json.loads((ROOT / "docs/benchmarks/convergence.json").read_text())
    problem = least_squares.make_problem(published["settings"]["rank"], published["settings"]["clients"])
    for row in published["results"]:
        law = least_squares.Law(problem, [row["k"]] * published["settings"]["clients"])
        start = law.excess(torch.zeros_like(law.optimum))
        states = list(law.moments(row["step_size"], 100))
        for number, value in zip(row["curve_rounds"], row["curve_predicted"], strict=True):
            if number <= 100:
                assert (law.expected_excess(*states[number]) / start).item() == pytest.approx(
                    value, rel=1e-8, abs=1e-13
                )
