"""A comparison's folder: what was compared in it is written down before the first run, and never written over."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from ..common.settings import default_of, shown
from ..config.decides import where
from ..storage.files import make_folder, write_text
from ..storage.locks import LOCK_NAME, held
from .arguments import RECIPE_TYPES
from .runs import Run
from .splits import Split

SAVED = "runs.json"
# Settings that change speed, logs or rounding, but not what is compared; older folders name one that is gone.
NEUTRAL = {*where(RECIPE_TYPES, lambda each: each.decides != "result" and not each.compared), "logging_dir"}
_DEFAULTS = {each.name: each for kind in RECIPE_TYPES for each in fields(kind)}


class Folder:
    """The paths of a comparison's folder."""

    def __init__(self, path: str | Path):
        self.path = Path(path)

    def run(self, name: str) -> Path:
        return self.path / "runs" / name

    def log(self, name: str) -> Path:
        return self.path / "logs" / f"{name}.log"

    def recipe(self, name: str) -> Path:
        return self.path / "recipes" / f"{name}.yaml"

    @contextmanager
    def claimed(self, runs: Sequence[Run], splits: Sequence[Split]) -> Iterator[None]:
        """Hold the folder for these runs: their recipes are written, and nobody else's work is touched.

        Raises:
            ValueError: the folder holds another comparison or something else, or another process compares in it.
        """
        saved, described = self._saved(), _describe(runs, splits)
        self._refuse_other(saved, described, runs)
        for part in ("runs", "logs", "recipes"):
            make_folder(self.path / part)
        with held(self.path):
            write_text(self.path / SAVED, json.dumps({"format": 1, "runs": saved | described}, indent=1) + "\n")
            for run in runs:
                write_text(self.recipe(run.name), yaml.safe_dump(run.settings, sort_keys=False, allow_unicode=True))
            yield

    def _saved(self) -> dict[str, Any]:
        """What was compared in this folder before, by run."""
        path = self.path / SAVED
        if path.is_file():
            try:
                return dict(json.loads(path.read_text(encoding="utf-8"))["runs"])
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"Expected {path} as a comparison wrote it, found damage ({error}): name another output_dir."
                ) from error
        if self.path.exists() and (
            not self.path.is_dir() or {path.name for path in self.path.iterdir()} - {LOCK_NAME}
        ):
            raise ValueError(
                f"Expected {self.path} to be empty or to hold this comparison, found something else: name another "
                "output_dir."
            )
        return {}

    def _refuse_other(self, saved: dict[str, Any], described: dict[str, Any], runs: Sequence[Run]) -> None:
        if saved and not saved.keys() & described.keys():
            raise ValueError(
                f"Expected this comparison in {self.path}, found another's runs ({', '.join(list(saved)[:3])}): name "
                "another output_dir."
            )
        if gone := sorted(saved.keys() - described.keys()):
            raise ValueError(
                f"Expected all runs that {self.path} reports on, found no {', '.join(gone[:3])} asked for: "
                "ask for these, too, or name another output_dir."
            )
        for run in runs:
            differing = _differing(saved[run.name], described[run.name]) if run.name in saved else []
            if differing:
                raise ValueError(
                    f"Expected this comparison in {self.path}, found {run.name} begun with something else: "
                    f"{'; '.join(differing)}. Name another output_dir, or set it back."
                )


def _describe(runs: Sequence[Run], splits: Sequence[Split]) -> dict[str, Any]:
    """What decides the results of each run, as plain JSON values."""
    found = {}
    for run in runs:
        split = next(split for split in splits if run.name in split.ranks)
        settings = {name: value for name, value in run.settings.items() if name not in NEUTRAL}
        found[run.name] = {"settings": settings, "rows": split.rows, "held_out": split.held_out}
    return json.loads(json.dumps(found, default=str))


def _differing(saved: dict[str, Any], described: dict[str, Any]) -> list[str]:
    names = {"rows": "the training rows changed", "held_out": "the held-out rows changed"}
    texts = [text for name, text in names.items() if saved[name] != described[name]]
    before, now = saved["settings"], described["settings"]
    for name in sorted((before.keys() | now.keys()) - NEUTRAL):
        default = default_of(_DEFAULTS[name]) if name in _DEFAULTS else None
        old, new = before.get(name, default), now.get(name, default)
        if old != new:
            texts.append(f"{name} was {shown(name, old)} and is {shown(name, new)}")
    return texts
