"""Entries of evaluations ranked, with confidence intervals and paired differences.

All values are shares of 1. Confidence intervals are 95 % normal approximations: value +- 1.96 standard errors.
"""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ..common.foreign_text import foreign_text
from ..common.settings import did_you_mean, sentence
from .entries import METRICS, Entry, Score

Z = 1.96  # standard errors to either side of a 95 % interval
_TIE = 1e-12  # averages this close are equal but for rounding


class HasError(Protocol):
    value: float
    standard_error: float


@dataclass(frozen=True)
class Estimate:
    value: float
    standard_error: float


@dataclass(frozen=True)
class Paired:
    """Mean difference of one entry to the reference over the `questions` of one task that both were asked."""

    value: float
    standard_error: float
    questions: int


@dataclass(frozen=True)
class Row:
    """One entry of a leaderboard.

    Args:
        rank: 1 and up; equal averages share one.
        name: the entry's name, made unique within the leaderboard.
        average: macro average over the leaderboard's `ranked_tasks`.
        paired: by task, where the entry and the reference share two questions or more.
        difference: of macro averages, entry less reference, over the questions both have; None for the reference, and
            where a ranked task has no paired difference.
        notes: which notes of the leaderboard hold for it, counted from 1.
    """

    rank: int
    name: str
    entry: Entry
    scores: dict[str, Score]
    average: Estimate
    paired: dict[str, Paired]
    difference: Estimate | None
    is_reference: bool
    notes: tuple[int, ...]

    def questions(self, tasks: Iterable[str]) -> int:
        return sum(self.scores[task].rows for task in tasks)


@dataclass(frozen=True)
class Leaderboard:
    """`tasks` are those of any entry, `ranked_tasks` those of all: the averages and ranks are over these.

    `majority_rates` are by task, of the reference's questions where it has the task; None if the metric has none.
    """

    metric: str
    tasks: tuple[str, ...]
    ranked_tasks: tuple[str, ...]
    rows: tuple[Row, ...]
    majority_rates: dict[str, float] | None
    notes: tuple[str, ...]

    @property
    def reference(self) -> Row:
        return next(row for row in self.rows if row.is_reference)


def rank(
    entries: Sequence[Entry], metric: str = "accuracy", reference: str | None = None, allow_other_prompts: bool = False
) -> Leaderboard:
    """The entries by their macro average over the tasks that all of them have, the best first.

    Args:
        metric: one of `METRICS`.
        reference: name or file of the entry that the others are compared with; the first ranked if None.
        allow_other_prompts: rank entries whose prompts differ, too, and say so beside them.

    Raises:
        ValueError: no entries, an unknown metric or reference, an entry without the metric, entries that share no
            task, or entries with different prompts.
    """
    _check(entries, metric, allow_other_prompts)
    tasks = tuple(dict.fromkeys(task for entry in entries for task in entry.scores[metric]))
    ranked_tasks = tuple(task for task in tasks if all(task in entry.scores[metric] for entry in entries))
    if not ranked_tasks:
        raise ValueError(
            f"Expected entries with a task in common, found {', '.join(tasks)} among {len(entries)} entries and none "
            "in all: leave out those that were asked other tasks."
        )
    names = unique_names(entries)
    averages = [combine([entry.scores[metric][task] for task in ranked_tasks]) for entry in entries]
    order = sorted(range(len(entries)), key=lambda i: (-round(averages[i].value, 12), names[i]))
    base = entries[order[0] if reference is None else _find(entries, names, reference)]
    rows, notes = [], {}
    for i in order:
        entry = entries[i]
        paired = {task: p for task in tasks if entry is not base and (p := pair(entry, base, metric, task))}
        complete = all(task in paired for task in ranked_tasks)
        texts = _remarks(entry, base, ranked_tasks, complete)
        row = Row(
            rank=1 + sum(other.value > averages[i].value + _TIE for other in averages),
            name=names[i],
            entry=entry,
            scores=entry.scores[metric],
            average=averages[i],
            paired=paired,
            difference=combine([paired[task] for task in ranked_tasks]) if complete else None,
            is_reference=entry is base,
            notes=tuple(notes.setdefault(text, len(notes) + 1) for text in texts),
        )
        rows.append(row)
    return Leaderboard(metric, tasks, ranked_tasks, tuple(rows), _majority(entries, base, metric, tasks), tuple(notes))


def combine(parts: Sequence[HasError]) -> Estimate:
    """The mean of independent estimates with its standard error, sqrt(sum of squares) / count."""
    error = math.sqrt(sum(part.standard_error**2 for part in parts)) / len(parts)
    return Estimate(math.fsum(part.value for part in parts) / len(parts), error)


def interval(estimate: HasError, lowest: float = 0.0) -> tuple[float, float]:
    """The 95 % confidence interval, clipped to what is possible (`lowest` is -1 for differences)."""
    reach = Z * estimate.standard_error
    return max(lowest, estimate.value - reach), min(1.0, estimate.value + reach)


def excludes_zero(difference: HasError) -> bool:
    """Whether 0 lies outside the 95 % interval of a difference."""
    low, high = interval(difference, -1.0)
    return low > 0 or high < 0


def pair(entry: Entry, base: Entry, metric: str, task: str) -> Paired | None:
    """Mean difference on the questions of a task that both were asked, matched by id and, of equal ones, by order.

    The standard error is that of a mean, sd / sqrt(n) with the sample's sd (n - 1), so it needs two questions. None
    with fewer, or without outcomes.
    """
    if entry.answers is None or base.answers is None or task not in entry.answers or task not in base.answers:
        return None
    mine, theirs = entry.answers[task], base.answers[task]
    right = dict(zip(theirs.questions, theirs.right[metric], strict=True))
    differences = [
        mark - right[question]
        for question, mark in zip(mine.questions, mine.right[metric], strict=True)
        if question in right
    ]
    n = len(differences)
    if n < 2:
        return None
    mean = sum(differences) / n
    squares = sum((difference - mean) ** 2 for difference in differences)
    return Paired(mean, math.sqrt(squares / (n - 1) / n), n)


def _check(entries: Sequence[Entry], metric: str, allow_other_prompts: bool) -> None:
    if not entries:
        raise ValueError("Expected at least one entry to rank, found none: name results files or folders of them.")
    if metric not in METRICS:
        raise ValueError(sentence("metric", f"one of {', '.join(METRICS)}", metric, did_you_mean(metric, METRICS)))
    for entry in entries:
        if metric not in entry.scores:
            raise ValueError(
                f"Expected scores of {metric} in {entry.source} ({entry.protocol}), found {', '.join(entry.scores)}: "
                "leave the file out, or rank by a metric that all files have."
            )
    first = entries[0]
    for entry in entries:
        if entry.prompt_hash != first.prompt_hash and not allow_other_prompts:
            raise ValueError(
                f"Expected entries that were asked with one prompt, found prompt hash {first.prompt_hash} in "
                f"{first.source} and {entry.prompt_hash} in {entry.source}: evaluate one of them anew, or allow other "
                "prompts (--allow_other_prompts) to rank them all the same."
            )


def _find(entries: Sequence[Entry], names: Sequence[str], reference: str) -> int:
    """Which entry is meant: by its name in the table, its file, or a name that only it has."""
    path = Path(reference).resolve()
    meanings = (
        [i for i, name in enumerate(names) if name == reference],
        [i for i, entry in enumerate(entries) if entry.source == reference or Path(entry.source).resolve() == path],
        [i for i, entry in enumerate(entries) if reference in (entry.name, Path(entry.source).name)],
    )
    hits = next((found for found in meanings if found), [])
    if len(hits) != 1:
        what = f"{len(hits)} entries named" if hits else "no entry named"
        near = [names[i] for i in hits] or names
        remedy = f"name one of {', '.join(near[:8])}" + (", ..." if len(near) > 8 else "")
        raise ValueError(f"Expected the reference to be one of the entries, found {what} {reference!r}: {remedy}.")
    return hits[0]


def unique_names(entries: Sequence[Entry]) -> list[str]:
    """A name for each entry: its own, and of equal ones what tells them apart (round, protocol, model, file)."""
    names = [foreign_text(entry.name) or "unnamed" for entry in entries]
    added: list[list[str]] = [[] for _ in entries]
    for trait in (_round, _protocol, _model, _source):
        full = [_with(name, extra) for name, extra in zip(names, added, strict=True)]
        counts = Counter(full)
        for name in (name for name, count in counts.items() if count > 1):
            group = [i for i, each in enumerate(full) if each == name]
            traits = [trait(entries[i]) for i in group]
            if len(set(traits)) > 1:
                for i, text in zip(group, traits, strict=True):
                    added[i] += [text] if text else []
    full = [_with(name, extra) for name, extra in zip(names, added, strict=True)]
    seen: Counter[str] = Counter()
    for i, name in enumerate(full):
        seen[name] += 1
        full[i] = name if seen[name] == 1 else f"{name} #{seen[name]}"
    return full


def _with(name: str, extra: Sequence[str]) -> str:
    return f"{name} ({', '.join(extra)})" if extra else name


def _round(entry: Entry) -> str:
    number = (entry.adapter or {}).get("round")
    return "" if number is None else f"round {number}"


def _protocol(entry: Entry) -> str:
    return entry.protocol


def _model(entry: Entry) -> str:
    return "@".join(str(entry.model[key]) for key in ("name", "revision") if entry.model.get(key))


def _source(entry: Entry) -> str:
    return entry.source


def _remarks(entry: Entry, base: Entry, tasks: Sequence[str], paired: bool) -> list[str]:
    """What a reader must know of an entry before comparing it with the reference."""
    remarks = []
    if entry.not_finite:
        count = f"{entry.not_finite:,}"
        remarks.append(f"In {count} questions the model computed something that is not a number; they count as wrong.")
    if entry.tied:
        remarks.append(f"In {entry.tied:,} questions the best options are equally likely; the first was chosen.")
    if entry.prompt_hash != base.prompt_hash:
        remarks.append(f"Asked with another prompt ({entry.prompt_hash}) than the reference ({base.prompt_hash}).")
    if entry.rows_hash != base.rows_hash and (remark := _other_questions(entry, base, tasks)):
        remarks.append(remark)
    if entry.answers is None:
        remarks.append("No outcomes file beside the results: no paired differences with it.")
    elif entry is not base and base.answers is not None and not paired:
        remarks.append("Fewer than two questions of a ranked task in common with the reference: no difference.")
    return remarks


def _other_questions(entry: Entry, base: Entry, tasks: Sequence[str]) -> str | None:
    """That the ranked tasks' questions differ; None if what differs lies in other tasks only."""
    if entry.answers is None or base.answers is None:
        return f"Asked other questions or tasks than the reference (rows hash {entry.rows_hash}): compare with care."
    mine, theirs = ({(task, q) for task in tasks for q in each.answers[task].questions} for each in (entry, base))
    if mine == theirs:
        return None
    return (
        f"Asked {len(mine):,} questions of the ranked tasks, the reference {len(theirs):,}; the difference is over "
        f"the {len(mine & theirs):,} that both were asked."
    )


def _majority(entries: Sequence[Entry], base: Entry, metric: str, tasks: Sequence[str]) -> dict[str, float] | None:
    if metric == "format_validity":
        return None
    by_task = [entry.scores[metric] for entry in (base, *entries)]
    return {task: next(scores[task].majority_rate for scores in by_task if task in scores) for task in tasks}
