"""The round ledger, `rounds.jsonl`: one JSON object a line, one line a round."""

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

LEDGER_NAME = "rounds.jsonl"
_HEAD = re.compile(rb'\{"round": (\d+)[,}]')  # of a line as `append_round` writes an engine's record


def read_records(path: str | Path) -> list[dict[str, Any]]:
    """The ledger's records in order; a last line that was torn while it was written is left out.

    Raises:
        ValueError: a whole line is not a JSON object.
    """
    *lines, tail = Path(path).read_text(encoding="utf-8", errors="replace").split("\n")
    # Whole JSON without its newline is a whole record; a record cut anywhere is not JSON.
    records = [_parse(line) for line in [*lines, *([tail] if _parse(tail) is not None else [])]]
    for number, record in enumerate(records, start=1):
        if not isinstance(record, dict):
            raise ValueError(
                f"Expected a round's JSON record on line {number} of {path}, found {lines[number - 1][:40]!r}: give "
                "the rounds.jsonl of a run as the run wrote it."
            )
    return records


def _parse(line: str) -> Any:
    """The JSON value of a line, None if it is not JSON."""
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return None


def append_round(path: str | Path, record: dict[str, Any]) -> None:
    """Add one round, on disk before this returns."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(record, allow_nan=False) + "\n")
        file.flush()
        os.fsync(file.fileno())


def keep_rounds(path: str | Path, rounds: int, source: str | Path | None = None) -> int:
    """Cut the ledger back to its first `rounds` rounds, as a resumed run needs it; returns how many it then holds.

    The rounds are read from `source` if given (a run that is taken up in another folder). The new file replaces the
    old one in one step, so that a crash leaves one or the other. Lines are told by their ends and copied as they are:
    parsing those of ten thousand rounds would take longer than all else in resuming.
    """
    source = Path(source or path)
    numbers = _numbers(source) if source.exists() else []
    if numbers is None:  # torn, damaged, or written by somebody else
        records = [record for record in read_records(source) if record["round"] < rounds]
        return _replace(path, (json.dumps(record, allow_nan=False).encode() + b"\n" for record in records))
    if not numbers:
        return _replace(path, ())
    with open(source, "rb") as lines:
        return _replace(path, (line for line, number in zip(lines, numbers, strict=True) if number < rounds))


def _numbers(path: Path) -> list[int] | None:
    """The round of every line, None unless all lines look whole and as `append_round` writes them."""
    numbers = []
    with open(path, "rb") as lines:
        for line in lines:
            head = _HEAD.match(line)
            if head is None or not line.endswith(b"}\n"):
                return None
            numbers.append(int(head[1]))
    return numbers


def _replace(path: str | Path, lines: Iterable[bytes]) -> int:
    """Make a file of these lines, in one step; returns how many they are."""
    temporary, count = Path(f"{path}.partial"), 0
    with open(temporary, "wb") as file:
        for line in lines:
            file.write(line)
            count += 1
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    return count
