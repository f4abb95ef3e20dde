"""Rows by the name of where they come from."""

import errno
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import (
    Dataset,
    DatasetDict,
    concatenate_datasets,
    config,
    load_dataset,
    load_from_disk,
)

from ..common.foreign_text import LONGEST_TASK, foreign_names, foreign_value
from ..storage.disk_errors import WriteError, is_full
from .commonsense import (
    COLUMNS,
    FIELDS,
    check_limit,
    check_rows,
    draw_rows,
    is_commonsense_folder,
    load_commonsense,
    render_row,
    to_dataset,
)
from .miniature import load_miniature
from .originals import load_originals, reason
from .texts import check_encoding

# The first of these that a data set has is held out.
_HELD_OUT = ("test", "validation")
_READERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}
_SAVED = ("dataset_dict.json", "state.json")  # what save_to_disk leaves in a folder


def load_rows(
    source: str,
    split: str,
    *,
    data_dir: str | None = None,
    tasks: Sequence[str] | None = None,
    rows_per_task: int | None = None,
    seed: int = 0,
) -> Dataset | None:
    """Rows of a named set, of files, or of a data set of the Hub.

    Rows in the published layout (`instruction`, `output`, `answer`) come out rendered, wherever they come from; their
    task is the column `task`, else the name of the file or folder. Other rows come out as they are.

    Args:
        source: `miniature`; `commonsense`, in `data_dir` or without one from its originals on the Hub; a file (.json,
            .jsonl, .parquet, .csv); a folder of commonsense tasks, of data files, or one that `save_to_disk` wrote;
            else the name of a data set of the Hub.
        split: `train`, or `test` for held-out rows (of other data sets their `test`, or `validation`, if any). A file
            is held out if that is its name.
        tasks, rows_per_task: which tasks, and how many rows of each, where rows are rendered here; the miniature set
            takes the multiple of 12 below, at least 12.
        seed: of the choice of rows.

    Returns the rows, None if there are none held out.

    Raises:
        OSError: a file, a folder or a data set of the Hub is missing or cannot be loaded.
        ValueError: a file does not hold rows, there is no such split, or a row cannot be used.
    """
    chosen = {"tasks": tasks, "split": split, "limit": rows_per_task, "seed": seed}
    if source == "commonsense":
        return load_originals(**chosen) if data_dir is None else load_commonsense(data_dir, **chosen)
    if source == "miniature":
        rows = {} if rows_per_task is None else {"rows_per_task": max(12, rows_per_task // 12 * 12)}
        return load_miniature(split=split, tasks=tasks, seed=seed, **rows)
    if is_commonsense_folder(source):
        return load_commonsense(source, **chosen)
    splits = _load_splits(source)
    names = ["train"] if split == "train" else [name for name in _HELD_OUT if name in splits][:1]
    if split == "train" and "train" not in splits:
        raise ValueError(
            f"Expected a split 'train' in {source}, found {foreign_names(splits)}: name another data set."
        )
    if not names:
        return None
    rows = splits[names[0]]
    if not len(rows):
        raise ValueError(f"Expected rows in the split {names[0]} of {source}, found none: name another data set.")
    check_encoding(rows, source)
    return _rendered(rows, source, **chosen) if _is_published(rows) else rows


def check_path(source: str) -> None:
    """Nothing, if rows may be there: a file or a folder, or a name that the Hub could have.

    Raises:
        FileNotFoundError: it can only be a path, and there is nothing.
    """
    path = Path(source)
    if "\0" in source or not source.strip():
        raise FileNotFoundError(f"Expected a file, a folder or a name of the Hub, found {source!r}: name one.")
    if not os.path.exists(path) and (path.is_absolute() or source.startswith(".") or path.suffix in _READERS):
        raise FileNotFoundError(f"Expected a file or folder of rows, found none at {source}: correct the path.")


def _load_splits(source: str) -> dict[str, Dataset]:
    """The splits of a file, a folder or a data set of the Hub."""
    path = Path(source)
    if path.is_file():
        return _load_file(path)
    if path.is_dir() and any((path / name).is_file() for name in _SAVED):
        splits = _load_saved(source)
        return splits if isinstance(splits, DatasetDict) else {_split_of(str(splits.split)): splits}
    check_path(source)
    try:
        splits = load_dataset(source)
    except Exception as error:  # each reader, and the Hub's client, raises types of its own
        _tell_full_disk(error)
        raise OSError(
            f"Expected {source} to be a folder of rows or a data set of the Hub, found {reason(error)}: correct the "
            "name, or load it once where the Hub can be reached."
        ) from error
    if not isinstance(splits, DatasetDict):
        raise ValueError(
            f"Expected {source} to have splits, found a {type(splits).__name__}: name a data set that has."
        )
    return splits


def _load_saved(source: str) -> Dataset | DatasetDict:
    try:
        return load_from_disk(source)
    except Exception as error:  # of JSON, of Arrow, and of keys that are missing
        raise ValueError(
            f"Expected {source} as save_to_disk wrote it, found {reason(error)}: save the data set once more."
        ) from error


def _load_file(path: Path) -> dict[str, Dataset]:
    if path.suffix not in _READERS:
        raise ValueError(
            f"Expected a file that ends in {', '.join(_READERS)}, found {path}: convert it to one of these."
        )
    split = _split_of(path.stem)
    if not path.stat().st_size:
        raise ValueError(f"Expected {path} to hold rows as {path.suffix[1:]}, found an empty file: name another.")
    try:
        return {split: load_dataset(_READERS[path.suffix], data_files={split: str(path)}, split=split)}
    except Exception as error:  # each reader raises types of its own
        _tell_full_disk(error)
        raise ValueError(
            f"Expected {path} to hold rows as {path.suffix[1:]}, found {reason(error)}: correct the file."
        ) from error


def _tell_full_disk(error: Exception) -> None:
    """Rows are read into the cache of `datasets`; no correction of theirs mends a disk that is full.

    Raises:
        WriteError: that is behind the error.
    """
    if is_full(error):
        cache = f"the cache of datasets, {config.HF_DATASETS_CACHE}"
        found = os.strerror(errno.ENOSPC)
        raise WriteError.of(errno.ENOSPC, cache, found, "start again, or set HF_DATASETS_CACHE to another") from error


def _split_of(name: str) -> str:
    return name if name in _HELD_OUT else "train"


def _is_published(rows: Dataset) -> bool:
    return {*FIELDS} <= {*rows.column_names} and not {"prompt", "completion"} & {*rows.column_names}


def _rendered(
    rows: Dataset, source: str, tasks: Sequence[str] | None, split: str, limit: int | None, seed: int
) -> Dataset:
    """Published rows as the trainer and the evaluation use them, with any further columns they have."""
    check_limit(limit)
    of_task = _tasks_of(rows, source)
    # A CSV reader takes true and false for more than texts.
    published = [
        r | {"answer": str(r["answer"]).lower()} if isinstance(r["answer"], bool) else r for r in rows.to_list()
    ]
    check_rows(published, source)
    rendered = to_dataset([render_row(row, task) for row, task in zip(published, of_task, strict=True)])
    further = rows.remove_columns([c for c in rows.column_names if c in (*COLUMNS, *FIELDS, "input")])
    if further.column_names:
        rendered = concatenate_datasets([rendered, further], axis=1)
    if absent := set(tasks or ()) - set(of_task):
        raise ValueError(
            f"Expected {source} to have rows of {', '.join(sorted(absent))}, found rows of "
            f"{foreign_names(set(of_task), most=20)}: correct the list of tasks."
        )
    kept = []
    for task in set(of_task) if tasks is None else tasks:
        places = [place for place, its_task in enumerate(of_task) if its_task == task]
        kept += [places[i] for i in draw_rows(len(places), limit, task, split, seed)]
    return rendered if len(kept) == len(rendered) else rendered.select(sorted(kept))


def _tasks_of(rows: Dataset, source: str) -> list[str]:
    """The task of each row."""
    if "task" not in rows.column_names:
        path = Path(source).resolve()
        name = path.stem if path.is_file() else path.name
        return [path.parent.name if name in ("train", *_HELD_OUT) else name] * len(rows)  # <task>/train.json
    of_task = rows["task"][:]
    if without := [number for number, task in enumerate(of_task) if not _is_name(task)]:
        raise ValueError(
            f"Expected a text in the column task of {source}, printable and of at most {LONGEST_TASK} characters, "
            f"found {foreign_value(of_task[without[0]])} in row {without[0]} (from 0): correct "
            "the row, or remove the column to have the file's name instead."
        )
    return of_task


def _is_name(task: Any) -> bool:
    """Whether it can head a column."""
    return isinstance(task, str) and 0 < len(task) <= LONGEST_TASK and task.isprintable()
