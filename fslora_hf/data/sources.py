"""Rows by the name of where they come from."""

from collections.abc import Sequence

from datasets import Dataset, DatasetDict, load_dataset

from .commonsense import load_commonsense
from .miniature import load_miniature

# The first of these that a data set has is held out.
_HELD_OUT = ("test", "validation")


def load_rows(
    source: str,
    split: str,
    *,
    data_dir: str | None = None,
    tasks: Sequence[str] | None = None,
    rows_per_task: int | None = None,
    seed: int = 0,
) -> Dataset | None:
    """Rows of `miniature`, of `commonsense` in `data_dir`, or of anything that `datasets.load_dataset` takes.

    Args:
        split: `train`, or `test` for held-out rows (of other data sets their `test`, or `validation`, if any).
        tasks, rows_per_task: of the first two sources; the miniature set takes the multiple of 12 below, at least 12.
        seed: of the choice of rows.

    Returns the rows, None if there are none held out.
    """
    if source == "commonsense":
        return load_commonsense(data_dir, tasks=tasks, split=split, limit=rows_per_task, seed=seed)
    if source == "miniature":
        rows = {} if rows_per_task is None else {"rows_per_task": max(12, rows_per_task // 12 * 12)}
        return load_miniature(split=split, tasks=tasks, seed=seed, **rows)
    splits = load_dataset(source)
    if not isinstance(splits, DatasetDict):
        raise ValueError(
            f"Expected {source} to have splits, found a {type(splits).__name__}: name a data set that has."
        )
    if split == "train":
        if "train" not in splits:
            raise ValueError(
                f"Expected a split 'train' in {source}, found {', '.join(splits)}: name another data set."
            )
        return splits["train"]
    return next((splits[name] for name in _HELD_OUT if name in splits), None)
