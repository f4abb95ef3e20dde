"""Student's t distribution: how far a mean of few values may be off.

Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.3 and 26.7.4: for whole degrees of freedom the
distribution is a finite sum of powers of a cosine.
"""

import math
from functools import cache


@cache
def quantile(freedom: int, level: float = 0.95) -> float:
    """The t that |T| exceeds with probability 1 - `level`, T with so many degrees of freedom, 1 or more."""
    low, high = 0.0, 1.0
    while inside(high, freedom) < level:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if inside(middle, freedom) < level else (low, middle)
    return high


def inside(t: float, freedom: int) -> float:
    """The probability that |T| <= t."""
    angle = math.atan(t / math.sqrt(freedom))
    sine, cosine = math.sin(angle), math.cos(angle)
    first = freedom % 2
    term = cosine if first else 1.0
    total = 0.0
    for power in range(first, freedom - 1, 2):
        total += term
        term *= (power + 1) / (power + 2) * cosine**2
    return 2 / math.pi * (angle + sine * total) if first else sine * total


def reach(spread: float, values: int) -> float:
    """Half of the 95 % confidence interval of a mean over so many values, 2 or more, of this sample's spread."""
    return quantile(values - 1) * spread / math.sqrt(values)
