"""The commonsense benchmark from local files in its published layout.

Eight question-answering tasks, each turned into instructions with named options: `<root>/<task>/{train,test}.json`,
a list of `{"instruction", "input", "output", "answer"}` with an empty `input`. The texts are described in
`templates.py`.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from datasets import Dataset

from ..common.draws import permutation_prefix
from .prompts import options, render_completion, render_prompt
from .templates import TEMPLATES

TASKS = tuple(TEMPLATES)
SPLITS = ("train", "test")
COLUMNS = ("prompt", "completion", "task", "answer")
FIELDS = ("instruction", "output", "answer")


def load_commonsense(
    data_dir: str | Path,
    tasks: Sequence[str] | None = None,
    split: str = "train",
    limit: int | None = None,
    seed: int = 0,
) -> Dataset:
    """Rows of the tasks' files as a dataset with the text columns `prompt`, `completion`, `task` and `answer`.

    Args:
        data_dir: folder that holds a folder for each task.
        tasks: names out of `TASKS`, in the order their rows shall have; None takes every task that has the split.
        split: `train` or `test`, the file's name without `.json`.
        limit: at most so many rows of each task, drawn from `seed` and kept in the file's order; None takes all.
        seed: of the draw of `limit` rows; a larger limit contains a smaller one.

    Raises:
        FileNotFoundError: the folder, or a file of a named task, is missing.
        ValueError: a task, split or limit is not one, or a file holds a row that cannot be used.
    """
    check_split(split)
    check_limit(limit)
    paths = _paths(Path(data_dir), None if tasks is None else check_tasks(tasks), split)
    rows = []
    for task, path in paths.items():
        published = read_rows(path)
        rows.extend(render_row(published[i], task) for i in draw_rows(len(published), limit, task, split, seed))
    return to_dataset(rows)


def draw_rows(count: int, limit: int | None, task: str, split: str, seed: int) -> Sequence[int]:
    """Which of `count` rows of a task to keep, in their order: the same ones wherever the rows come from."""
    if limit is None or limit >= count:
        return range(count)
    return sorted(permutation_prefix(count, limit, seed, "commonsense", task, split).tolist())


def read_rows(path: Path) -> list[dict[str, str]]:
    """The published rows of one file, each checked.

    Raises:
        ValueError: the file is not a JSON list of rows, or a row lacks a field or does not fit its own options.
    """
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"Expected {path} to be UTF-8 JSON, found {error}: download the file again.") from error
    except OSError as error:
        raise OSError(f"Expected {path} to be readable, found '{error.strerror}': mend that.") from error
    if not isinstance(rows, list) or not rows:
        raise ValueError(
            f"Expected {path} to hold a list of rows, found {rows if rows == [] else type(rows).__name__}: download "
            "the file again."
        )
    check_rows(rows, path)
    return rows


def check_rows(rows: Iterable[object], where: str | Path) -> None:
    """Raises ValueError at the first row that lacks a field of the published layout or is at odds with its options."""
    for number, row in enumerate(rows):
        found = _problem(row)
        if found is not None:
            raise ValueError(
                f"Expected every row of {where} to have the texts {', '.join(FIELDS)}, with an answer that its output "
                f"names and its answer format allows, found {found} in row {number} (from 0): correct or remove it."
            )


def render_row(row: Mapping[str, str], task: str) -> dict[str, str]:
    """A published row as the trainer and the evaluation use it."""
    return {
        "prompt": render_prompt(row["instruction"]),
        "completion": render_completion(row["output"]),
        "task": task,
        "answer": row["answer"],
    }


def to_dataset(rows: Sequence[Mapping[str, str]]) -> Dataset:
    """Rendered rows as a dataset in memory, which writes no cache file."""
    return Dataset.from_dict({column: [row[column] for row in rows] for column in COLUMNS})


def check_tasks(tasks: Iterable[str], known: Iterable[str] = TASKS) -> list[str]:
    """The task names as a list.

    Raises:
        ValueError: there is none, one is repeated, or one is not known.
    """
    tasks = [tasks] if isinstance(tasks, str) else list(tasks)
    if not tasks or len(set(tasks)) < len(tasks) or not set(tasks) <= set(known):
        raise ValueError(
            f"Expected different tasks out of {', '.join(known)}, found {tasks}: correct the list of tasks."
        )
    return tasks


def check_split(split: str) -> None:
    """Raises ValueError unless `split` is one of `SPLITS`."""
    if split not in SPLITS:
        raise ValueError(f"Expected the split to be one of {', '.join(SPLITS)}, found {split!r}: name one of them.")


def check_limit(limit: int | None) -> None:
    """Raises ValueError if `limit` asks for less than one row per task."""
    if limit is not None and limit < 1:
        raise ValueError(f"Expected a limit of at least 1 row per task, found {limit}: leave it out to take all rows.")


def is_commonsense_folder(folder: str | Path) -> bool:
    """Whether the folder holds a file of a task in the published layout."""
    return any(Path(folder, task, f"{split}.json").is_file() for task in TASKS for split in SPLITS)


def _paths(root: Path, tasks: list[str] | None, split: str) -> dict[str, Path]:
    """The file of each task."""
    if not root.is_dir():
        raise FileNotFoundError(f"Expected a folder of commonsense tasks, found none at {root}: correct the path.")
    paths = {task: root / task / f"{split}.json" for task in tasks or TASKS}
    missing = [str(path) for path in paths.values() if not path.is_file()]
    if missing and (tasks or len(missing) == len(TASKS)):
        raise FileNotFoundError(
            f"Expected {'the file of every named task' if tasks else 'the file of at least one task'}, found no "
            f"{', '.join(missing)}: add what is missing, or choose other tasks or another split."
        )
    return {task: path for task, path in paths.items() if path.is_file()}


def _is_whole(text: str) -> bool:
    """Whether every character has both halves, which JSON does not ask for and no file can hold."""
    try:
        return text.isascii() or bool(text.encode())
    except UnicodeEncodeError:
        return False


def _problem(row: object) -> str | None:
    """What keeps a published row from being used, or None."""
    if not isinstance(row, dict):
        return f"a {type(row).__name__}"
    absent = [field for field in FIELDS if not isinstance(row.get(field), str) or not row[field]]
    if absent:
        return f"no text in {', '.join(absent)}"
    if any(not _is_whole(row[field]) for field in FIELDS):
        return "half a character"
    if row.get("input"):
        return "an input beside the instruction, which the prompt would not show,"
    try:
        allowed = options(row)
    except ValueError:
        return "no usable answer format"
    if row["answer"] not in allowed:
        return f"the answer {row['answer']!r}, not one of {'/'.join(allowed)},"
    if row["answer"] not in row["output"]:
        return f"the output {row['output']!r}, which does not name the answer {row['answer']!r},"
    return None
