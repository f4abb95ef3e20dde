"""The round ledger, `rounds.jsonl`: one JSON object a line, one line a round."""

import json
import os
import re
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

from .storage.disk_errors import RESUME, told
from .storage.files import append_line, whole_file

LEDGER_NAME = "rounds.jsonl"
_TAIL = 1 << 16  # bytes that are read at once from its end
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


def last_records(path: str | Path, count: int) -> list[dict[str, Any]]:
    """The last records of a ledger in order, at most so many, without reading what is before them; none if there is no
    ledger. What is no record is left out."""
    if not Path(path).is_file():
        return []
    with open(path, "rb") as file:
        left, tail = file.seek(0, os.SEEK_END), b""
        while left and tail.count(b"\n") <= count:
            step = min(left, _TAIL)
            left -= step
            file.seek(left)
            tail = file.read(step) + tail
    lines = tail.decode("utf-8", errors="replace").split("\n")
    records = [_parse(line) for line in lines[1 if left else 0 :]]
    return [record for record in records if isinstance(record, dict)][-count:]


def _parse(line: str) -> Any:
    """The JSON value of a line, None if it is not JSON."""
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return None


def append_round(path: str | Path, record: dict[str, Any]) -> None:
    """Add one round, on disk before this returns; an error leaves the ledger as it was.

    Raises:
        WriteError: the disk failed or is full.
    """
    append_line(path, json.dumps(record, allow_nan=False), RESUME)


def keep_rounds(path: str | Path, rounds: int, source: str | Path | None = None) -> int:
    """Cut the ledger back to its first `rounds` rounds, as a resumed run needs it; returns how many it then holds.

    The rounds are read from `source` if given (a run that is taken up in another folder). A crash leaves the old
    ledger or the new one. Lines are told by their ends and left as they are: to parse those of ten thousand rounds, or
    to write them again, would take longer than all else in resuming.
    """
    source = Path(source or path)
    if not source.exists():
        return _replace(path, ())
    ends = _ends(source)
    if ends is None:  # torn, damaged, or written by somebody else
        records = [record for record in read_records(source) if record["round"] < rounds]
        return _replace(path, (json.dumps(record, allow_nan=False).encode() + b"\n" for record in records))
    kept = [end for round, end in ends.items() if round < rounds]
    if source == Path(path):
        _cut(path, max(kept, default=0))
    else:
        with open(source, "rb") as lines:
            _replace(path, islice(lines, len(kept)))
    return len(kept)


def _ends(path: Path) -> dict[int, int] | None:
    """Where the line of each round ends, None unless all lines look whole and as `append_round` writes them, their
    rounds ascending."""
    ends: dict[int, int] = {}
    last, end = -1, 0
    with open(path, "rb") as lines:
        for line in lines:
            head = _HEAD.match(line)
            if head is None or not line.endswith(b"}\n") or int(head[1]) <= last:
                return None
            last, end = int(head[1]), end + len(line)
            ends[last] = end
    return ends


def _cut(path: str | Path, size: int) -> None:
    """Leave a file's first `size` bytes; one that has no more is not touched."""
    if size < os.path.getsize(path):
        with told(path), open(path, "r+b") as file:
            file.truncate(size)
            os.fsync(file.fileno())


def _replace(path: str | Path, lines: Iterable[bytes]) -> int:
    """Make a file of these lines, in one step; returns how many they are."""
    count = 0
    with whole_file(path) as file:
        for line in lines:
            file.write(line)
            count += 1
    return count
