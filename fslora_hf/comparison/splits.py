"""The rows of each run before it starts: whose they are, and digests that tell whether they changed since."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from datasets import Dataset

from ..data.clients import ClientIndex
from ..launch import held_out_rows, training_rows
from ..trainers.identity import ranks_of_clients
from .runs import PARTITION, Run

ALL_ROWS = "all rows"  # stands for the task of rows that name none


@dataclass(frozen=True)
class Split:
    """How the rows of some runs are dealt.

    Args:
        name: what tells it from the others, for people.
        tasks: in the order of the figure.
        counts: rows of each client (by ascending id) in each task.
        rows: digest of the training rows, whoever they belong to.
        held_out: digest of the rows that are scored.
        ranks: what each client affords, by run.
    """

    name: str
    seed: int
    tasks: tuple[str, ...]
    counts: tuple[tuple[int, ...], ...]
    rows: str
    held_out: str
    ranks: dict[str, tuple[int, ...]]

    @property
    def runs(self) -> tuple[str, ...]:
        return tuple(self.ranks)


def splits_of(runs: Sequence[Run]) -> list[Split]:
    """One for each seed and way to split; rows are counted as dealt, before any is found too long.

    Raises:
        ValueError, OSError: rows cannot be loaded or split, or none are held out.
    """
    groups: dict[str, list[Run]] = {}
    for run in runs:
        key = json.dumps([run.seed, *(run.setting(name) for name in PARTITION)], default=str)
        groups.setdefault(key, []).append(run)
    found = [_split(group) for group in groups.values()]
    for seed in {run.seed for run in runs}:
        _check_same_rows([split for split in found if split.seed == seed])
    return found


def _split(runs: Sequence[Run]) -> Split:
    run = runs[0]
    held_out = held_out_rows(run.recipe, run.seed)
    if held_out is None:
        raise ValueError(
            f"Expected held-out rows in {run.recipe.dataset}, found none: name a data set with a split test."
        )
    rows = training_rows(run.recipe, run.args)
    column = run.args.client_id_column
    index = ClientIndex.from_dataset(rows, column)
    labels = rows["task"] if "task" in rows.column_names else [ALL_ROWS] * len(rows)
    tasks = tuple(dict.fromkeys(sorted(labels)))
    numbers = np.array([tasks.index(label) for label in labels])
    counts = [np.bincount(numbers[index.shard(i)], minlength=len(tasks)).tolist() for i in range(len(index))]
    dealt = f"{run.recipe.partition}, {len(index)} clients, seed {run.seed}"
    ranks = {each.name: ranks_of_clients(each.args, len(index), each.model.lora_r) for each in runs}
    return Split(
        name=dealt if run.recipe.dirichlet_alpha is None else f"{dealt}, alpha {run.recipe.dirichlet_alpha:g}",
        seed=run.seed,
        tasks=tasks,
        counts=tuple(map(tuple, counts)),
        rows=digest(rows.remove_columns(column)),
        held_out=digest(held_out),
        ranks={name: tuple(values.tolist()) for name, values in ranks.items()},
    )


def digest(rows: Dataset | Iterable[dict]) -> str:
    """16 hexadecimal digits of some rows in order."""
    found = hashlib.sha256()
    for row in rows:
        found.update(json.dumps(row, sort_keys=True, default=str).encode() + b"\n")
    return found.hexdigest()[:16]


def _check_same_rows(splits: Sequence[Split]) -> None:
    for split in splits[1:]:
        for name in ("rows", "held_out"):
            if getattr(split, name) != getattr(splits[0], name):
                raise ValueError(
                    f"Expected the same rows however they are split, found others in {splits[0].name} and "
                    f"{split.name}: compare runs on the same rows."
                )


def check_unchanged(runs: Sequence[Run], splits: Sequence[Split]) -> None:
    """Refuse what was trained on rows that changed while the runs were under way.

    Raises:
        ValueError, OSError: the rows of a split are others now, or gone.
    """
    for before, now in zip(splits, splits_of(runs), strict=True):
        if before != now:
            raise ValueError(
                f"Expected the rows of {before.name} to stay as they were, found that they changed while runs were "
                "under way: put them back, remove the runs that were trained since, and compare again."
            )
