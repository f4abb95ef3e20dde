"""Student's t against published values and against a sum over its density."""

import math

import pytest

from fslora_hf.reports.student import inside, quantile, reach

# NIST/SEMATECH e-Handbook of Statistical Methods, table 1.3.6.7.2, column 0.975.
TABLE = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 9: 2.262, 10: 2.228, 20: 2.086, 30: 2.042}


@pytest.mark.parametrize("freedom", TABLE)
def test_quantiles_are_those_of_the_published_table(freedom):
    assert round(quantile(freedom), 3) == TABLE[freedom]


def test_it_comes_to_the_normal_distribution():
    assert quantile(100_000) == pytest.approx(1.959964, abs=1e-4)
    assert quantile(3, 0.99) == pytest.approx(5.841, abs=1e-3)


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 7, 12])
@pytest.mark.parametrize("t", [0.1, 1.0, 3.0])
def test_probabilities_are_sums_over_the_density(freedom, t):
    """Simpson's rule over the density as its definition has it."""
    scale = math.gamma((freedom + 1) / 2) / math.sqrt(freedom * math.pi) / math.gamma(freedom / 2)
    steps = 2000
    at = [scale * (1 + (t * i / steps) ** 2 / freedom) ** (-(freedom + 1) / 2) for i in range(steps + 1)]
    weights = [1 if i in (0, steps) else 4 if i % 2 else 2 for i in range(steps + 1)]
    assert inside(t, freedom) == pytest.approx(
        2 * t / steps / 3 * sum(w * y for w, y in zip(weights, at, strict=True)), abs=1e-10
    )


def test_the_reach_of_a_mean():
    """By hand: 1 and 3 have the spread root 2, so their mean is off by 12.706 * root 2 / root 2."""
    assert reach(math.sqrt(2), 2) == pytest.approx(12.7062, abs=1e-4)
    assert reach(2.0, 4) == pytest.approx(3.18245, abs=1e-4)
