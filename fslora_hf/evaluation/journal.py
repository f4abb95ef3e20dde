"""The questions an evaluation has finished, on disk while it runs: a killed one goes on from there."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..common.foreign_text import foreign_names
from ..common.settings import is_a
from ..storage.disk_errors import told
from ..storage.files import make_folder
from .outcomes import Outcome

GO_ON = "start again: finished questions are kept"


class Journal:
    """Outcomes by row, in one hidden file a process and attempt, `.<name>.<attempt>-<process>.partial.jsonl`.

    Args:
        folder: where the evaluation's result file will be.
        name: that file's name without its endings.
        identity: what makes it that evaluation, plain JSON values; the outcomes of another are refused.
    """

    def __init__(self, folder: str | Path, name: str, identity: Mapping[str, Any]):
        self.folder, self.name = Path(folder), name
        self.identity = json.loads(json.dumps(identity))
        self._file = None

    def read(self) -> tuple[dict[int, Outcome], int]:
        """What earlier attempts have finished, by row, and the number of the next attempt.

        A line that was torn while it was written ends its file; its question is asked again.

        Raises:
            ValueError: the files are of another evaluation.
        """
        done: dict[int, Outcome] = {}
        paths = self._paths()
        for path in paths:
            head, *records = _whole_records(path) or [None]
            if head is not None and head != self.identity:
                differing = {key for key in {*head, *self.identity} if head.get(key) != self.identity.get(key)}
                raise ValueError(
                    f"Expected the unfinished evaluation in {path} to be this one, found that it differs in "
                    f"{foreign_names(differing, most=8)}: finish it with its own settings, remove the file, "
                    "or name another results_dir."
                )
            done |= _outcomes(records)
        attempts = [int(path.name.rsplit(".", 3)[1].split("-")[0]) for path in paths]
        return done, max(attempts, default=0) + 1

    def open(self, attempt: int, process: int) -> None:
        """Begin this process's file."""
        path = make_folder(self.folder) / f".{self.name}.{attempt}-{process}.partial.jsonl"
        with told(path):
            self._file = open(path, "w", encoding="utf-8")  # noqa: SIM115  (closed by `close`)
        self._write([self.identity])

    def append(self, rows: Sequence[int], outcomes: Sequence[Outcome]) -> None:
        """Add some finished questions; they are with the kernel when this returns, which a kill does not undo."""
        self._write([{"row": row, **outcome.to_record()} for row, outcome in zip(rows, outcomes, strict=True)])

    def close(self) -> None:
        if self._file is not None:
            with told(self._file.name, GO_ON):  # an error leaves what could not be written, to be written now
                self._file.close()

    def remove(self) -> None:
        """Remove every file of this evaluation, once its results stand."""
        for path in self._paths():
            path.unlink()

    def _paths(self) -> list[Path]:
        return sorted(self.folder.glob(f".{self.name}.*-*.partial.jsonl"))

    def _write(self, records: Sequence[Mapping[str, Any]]) -> None:
        with told(self._file.name, GO_ON):
            self._file.writelines(json.dumps(record, allow_nan=False) + "\n" for record in records)
            self._file.flush()


def _whole_records(path: Path) -> list[dict[str, Any]]:
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            break
        if not isinstance(record, dict):
            break
        records.append(record)
    return records


def _outcomes(records: Iterable[Mapping[str, Any]]) -> dict[int, Outcome]:
    """Outcomes by row, up to the first record that is not whole."""
    found = {}
    for record in records:
        try:
            outcome, row = Outcome.from_record(record), record["row"]
        except (KeyError, TypeError, ValueError):
            break
        if not is_a(row, int) or not _is_whole(outcome):
            break
        found[row] = outcome
    return found


def _is_whole(outcome: Outcome) -> bool:
    """Whether each value is of its kind; what a line says of itself is not looked into."""
    texts = (outcome.question, outcome.task, outcome.answer, *outcome.options)
    maybe = (outcome.choice, outcome.choice_norm, outcome.text)
    numbers = outcome.log_likelihoods
    return (
        all(isinstance(text, str) for text in texts)
        and all(text is None or isinstance(text, str) for text in maybe)
        and isinstance(outcome.finite, bool)
        and (numbers is None or len(numbers) == len(outcome.options) and all(is_a(x, float) for x in numbers))
    )
