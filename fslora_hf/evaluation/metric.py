"""The metric that every score comes from, loaded as a user would: by the package `evaluate`, from its folder."""

import importlib
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import evaluate

FOLDER = Path(__file__).parent / "commonsense_qa"


def load_metric() -> "evaluate.Metric":
    """A metric without rows, which keeps its rows in memory. Needs no network; any number of processes may load it.

    A new one each time: one whose `compute` was refused may keep a part of what it was given.
    """
    return _metric_class()(keep_in_memory=True)


def first_answer(text: str, task: str, names: Sequence[str] | None = None) -> str | None:
    """The answer of a task that a text names first by the metric's rule, or None.

    Args:
        text: prompt and response together. Of the response alone, what follows a response mark that the model wrote
            itself would count, and not what precedes it.
        task: one of the eight commonsense tasks, unless `names` is given.
        names: the answers to look for instead of the task's.

    Raises:
        ValueError: the task is not known, or a name is empty.
    """
    return _metric_class().first_answer(text, task, None if names is None else {task: list(names)})


@cache
def _metric_class() -> "type[evaluate.Metric]":
    return type(_evaluate().load(str(FOLDER), keep_in_memory=True))


def _evaluate() -> ModuleType:
    """The package `evaluate`, also in a script called evaluate.py: its folder stands first on the path of imports."""
    if not hasattr(sys.modules.get("evaluate"), "__path__"):
        sys.modules.pop("evaluate", None)  # the script, imported as a module
        path = sys.path[:]
        sys.path[:] = [entry for entry in path if not (Path(entry) / "evaluate.py").is_file()]
        try:
            importlib.import_module("evaluate")
        finally:
            sys.path[:] = path
    return sys.modules["evaluate"]
