"""The numbers of a comparison: means and spreads over seeds, and differences within a seed."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

from .results import Point, Result
from .runs import Variant
from .splits import Split

FORMAT = 1
# What is compared by its difference, beside being shown itself.
COMPARED = ("accuracy", "loss")


def summarise(
    title: str,
    budget: dict[str, Any],
    seeds: Sequence[int],
    variants: Sequence[Variant],
    results: Sequence[Result],
    splits: Sequence[Split],
) -> dict[str, Any]:
    """Everything that a report shows, as plain JSON values.

    A value over seeds is `{"mean", "spread", "n"}`: the spread is the sample's standard deviation (n - 1), None for
    one seed. Accuracies are shares of 1, losses nats a token, megabytes 10**6 bytes.
    """
    found = []
    for position, variant in enumerate(variants):
        own = [result for result in results if result.run.variant == position]
        theirs = [result for result in results if result.run.variant == variant.reference]
        found.append(
            {
                "label": variant.label,
                "case": variant.case,
                "rank_law": variant.law,
                "method": variant.method,
                "reference": None if variant.reference is None else variants[variant.reference].label,
                **_totals(own, splits),
                "difference": {name: over_seeds(_differences(own, theirs, name)) for name in COMPARED},
                "curve": _curve(own),
                "rank_losses": _rank_losses(own),
                "runs": [_run(result) for result in own],
            }
        )
    rates = [result.majority_rate for result in results if result.majority_rate is not None]
    return {
        "format": FORMAT,
        "title": title,
        "budget": budget,
        "variants": found,
        "majority_rate": sum(rates) / len(rates) if rates else None,
        "splits": [_split(split) for split in splits],
        "notes": list(_notes(seeds, variants, results)),
    }


def over_seeds(values: Iterable[float | None]) -> dict[str, Any] | None:
    """Mean and sample standard deviation of one value a seed; None without any."""
    values = [value for value in values if value is not None]
    n = len(values)
    if not n:
        return None
    mean = math.fsum(values) / n
    spread = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1)) if n > 1 else None
    return {"mean": mean, "spread": spread, "n": n}


def _totals(own: Sequence[Result], splits: Sequence[Split]) -> dict[str, Any]:
    ranks = {name: values for split in splits for name, values in split.ranks.items()}
    return {
        "accuracy": over_seeds(result.points[-1].accuracy for result in own),
        "loss": over_seeds(result.points[-1].loss for result in own),
        "megabytes_up": over_seeds(result.totals["bytes_up"] / 1e6 for result in own),
        "megabytes_down": over_seeds(result.totals["bytes_down"] / 1e6 for result in own),
        "seconds": over_seeds(result.totals["seconds"] for result in own),
        "rounds": over_seeds(float(result.totals["rounds"]) for result in own),
        "mean_rank": over_seeds(
            sum(ranks[result.run.name]) / len(ranks[result.run.name]) for result in own if ranks.get(result.run.name)
        ),
    }


def _differences(own: Sequence[Result], theirs: Sequence[Result], name: str) -> list[float | None]:
    """One for each seed that both have."""
    by_seed = {result.run.seed: getattr(result.points[-1], name) for result in theirs}
    pairs = [(getattr(result.points[-1], name), by_seed.get(result.run.seed)) for result in own]
    return [mine - other for mine, other in pairs if mine is not None and other is not None]


def _curve(own: Sequence[Result]) -> list[dict[str, Any]]:
    """The evaluations that every seed has: those after the same number of rounds, and each run's last."""
    if not own:
        return []
    rounds = set.intersection(*({point.round for point in result.points[:-1]} for result in own))
    groups = [
        [point for result in own for point in result.points[:-1] if point.round == done] for done in sorted(rounds)
    ]
    groups.append([result.points[-1] for result in own])
    return [_curve_point(group) for group in groups]


def _curve_point(points: Sequence[Point]) -> dict[str, Any]:
    return {
        "round": sum(point.round for point in points) / len(points),
        "megabytes_up": sum(point.bytes_up for point in points) / len(points) / 1e6,
        "loss": over_seeds(point.loss for point in points),
        "accuracy": over_seeds(point.accuracy for point in points),
    }


def _rank_losses(own: Sequence[Result]) -> dict[str, Any]:
    ranks = sorted({rank for result in own for rank in result.rank_losses})
    return {str(rank): over_seeds(result.rank_losses.get(rank) for result in own) for rank in ranks}


def _run(result: Result) -> dict[str, Any]:
    return {
        "name": result.run.name,
        "seed": result.run.seed,
        "points": [vars(point) for point in result.points],
        "totals": result.totals,
        "data": result.identity["data"],
        "scoring": result.scoring,
    }


def _split(split: Split) -> dict[str, Any]:
    return {
        "name": split.name,
        "tasks": split.tasks,
        "counts": split.counts,
        "rows": split.rows,
        "held_out": split.held_out,
        "ranks": split.ranks,
    }


def _notes(seeds: Sequence[int], variants: Sequence[Variant], results: Sequence[Result]) -> Iterable[str]:
    """What a reader must know before reading the numbers."""
    if len(seeds) == 1:
        yield f"One seed ({seeds[0]}): there is no spread, and no difference here can be told from chance."
    scored = {result.scoring["rows_hash"] for result in results if result.scoring}
    if len(scored) > 1:
        yield (
            "Seeds were scored on rows of their own: the spread of a value contains that choice of rows, the spread "
            "of a difference hardly."
        )
    refused = {result.run.name: result.totals["refused"] for result in results if result.totals["refused"]}
    for name, count in refused.items():
        yield f"{name}: {count} updates were left out (see its rounds.jsonl)."
    for result in results:
        if result.short_of_budget:
            yield (
                f"{result.run.name}: {result.totals['rounds']} rounds, all that num_rounds allows, sent "
                f"{result.totals['bytes_up'] / 1e6:.2f} MB, less than the budget: raise num_rounds."
            )
    for position, variant in enumerate(variants):
        missing = [str(seed) for seed in seeds if not any(_is(result, position, seed) for result in results)]
        if missing:
            yield f"{variant.label}: no finished run of seed {', '.join(missing)}."


def _is(result: Result, position: int, seed: int) -> bool:
    return (result.run.variant, result.run.seed) == (position, seed)
