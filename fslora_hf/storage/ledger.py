"""The round ledger, `rounds.jsonl`: one JSON object a line, one line a round."""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from ..common.foreign_text import foreign_value
from .disk_errors import RESUME, told
from .files import append_line, whole_file

LEDGER_NAME = "rounds.jsonl"
_TAIL = 1 << 16  # bytes that are read at once from its end
_BLOCK = 2**20  # bytes that are read at once
_REMEDY = (
    "restore it from a copy, resume from a checkpoint of before, or move it away to go on without those rounds in it"
)


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
                f"Expected a round's JSON record on line {number} of {path}, found "
                f"{foreign_value(lines[number - 1][:40])}: give the rounds.jsonl of a run as the run wrote it."
            )
    return records


def last_records(path: str | Path, count: int) -> list[dict[str, Any]]:
    """The last records of a ledger in order, at most so many, without reading what is before them; none if there is no
    ledger. What is no record is left out."""
    if not Path(path).is_file():
        return []
    with open(path, "rb") as file:
        left, ends = file.seek(0, os.SEEK_END), 0
        blocks: list[bytes] = []
        while left and ends <= count:
            step = min(left, _TAIL)
            left -= step
            file.seek(left)
            blocks.append(file.read(step))
            ends += blocks[-1].count(b"\n")
    lines = b"".join(reversed(blocks)).decode("utf-8", errors="replace").split("\n")
    records = [_parse(line) for line in lines[1 if left else 0 :]]
    return [record for record in records if isinstance(record, dict)][-count:]


def _parse(line: str | bytes) -> Any:
    """The JSON value of a line, None if it is not JSON as `append_round` writes it, without NaN and infinity."""
    try:
        return _STRICT.decode(line if isinstance(line, str) else line.decode())
    except (ValueError, RecursionError):
        return None


def _refuse(name: str) -> None:
    raise ValueError(name)


_STRICT = json.JSONDecoder(parse_constant=_refuse)


def append_round(path: str | Path, record: dict[str, Any]) -> None:
    """Add one round, on disk before this returns; an error leaves the ledger as it was.

    Raises:
        WriteError: the disk failed or is full.
    """
    append_line(path, json.dumps(record, allow_nan=False), RESUME)


class Marker:
    """Marks a ledger that only grows, and for each mark reads only what was added since the last: the ten-thousandth
    checkpoint is as cheap as the first."""

    def __init__(self, path: str | Path):
        self._path = Path(path)
        self._rounds, self._size, self._digest = 0, 0, hashlib.sha256()

    def mark(self) -> dict[str, Any] | None:
        """How many rounds and bytes the ledger has, and their SHA-256: what tells later that it is as it was. None
        without one."""
        if not self._path.is_file():
            return None
        with open(self._path, "rb") as file:
            file.seek(self._size)
            while block := file.read(_BLOCK):
                self._rounds, self._size = self._rounds + block.count(b"\n"), self._size + len(block)
                self._digest.update(block)
        return {"rounds": self._rounds, "bytes": self._size, "sha256": self._digest.hexdigest()}


def mark(path: str | Path) -> dict[str, Any] | None:
    """The mark of a ledger as it is now; see `Marker`."""
    return Marker(path).mark()


@dataclass(frozen=True)
class Kept:
    """What a resumed run keeps of a ledger.

    Attributes:
        path: the ledger.
        rounds: how many it holds.
        size: its first bytes, which hold them, or None:
        lines: the lines to write in their place.
        records: parsed, None where they are as a checkpoint saw them and need not be.
        mended: what was wrong with those that are not kept, for a warning.
    """

    path: Path
    rounds: int = 0
    size: int | None = None
    lines: tuple[bytes, ...] = ()
    records: tuple[dict[str, Any], ...] | None = None
    mended: str = ""

    def write(self, path: str | Path) -> None:
        """Make them the ledger at `path`. A crash leaves the old ledger or the new one, and lines that stand as they
        should are not written again."""
        if self.size is None:
            _replace(path, self.lines)
        elif self.path == Path(path):
            _cut(path, self.size)
        else:
            with open(self.path, "rb") as file:
                _replace(path, _blocks(file, self.size))


def find_rounds(path: str | Path, rounds: int, seen: Mapping[str, Any] | None = None) -> Kept:
    """What a run that goes on after `rounds` rounds keeps of a ledger; changes nothing.

    Args:
        seen: what `mark` said of it when it held these rounds. If it still begins so, no line need be parsed: at ten
            thousand rounds that would take longer than all else in resuming.

    Raises:
        ValueError: it does not hold each of the rounds once. Rounds before its first are not missed unless they were
            seen, since a run may have gone on without its ledger: `Kept.rounds` tells.
    """
    path = Path(path)
    if not path.exists():
        return Kept(path)
    if not path.is_file():
        raise ValueError(f"Expected the ledger {path} to be a file, found a folder: {_REMEDY}.")
    if rounds == 0:
        return Kept(path, size=0)
    if seen is not None and seen["rounds"] <= rounds and _begins_so(path, seen):
        return Kept(path, seen["rounds"], seen["bytes"])
    return _read_rounds(path, rounds, 0 if seen is None else seen["rounds"])


def keep_rounds(path: str | Path, rounds: int) -> int:
    """Cut the ledger back to its first `rounds` rounds; returns how many it then holds. See `find_rounds`."""
    kept = find_rounds(path, rounds)
    kept.write(path)
    return kept.rounds


def _begins_so(path: Path, seen: Mapping[str, Any]) -> bool:
    if path.stat().st_size < seen["bytes"]:
        return False
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for block in _blocks(file, seen["bytes"]):
            digest.update(block)
    return digest.hexdigest() == seen["sha256"]


def _read_rounds(path: Path, rounds: int, least: int) -> Kept:
    """The rounds of a ledger that has changed, or of which nothing is known but that it held so many, line by line."""
    found: dict[int, tuple[bytes, dict[str, Any]]] = {}
    wrong, size, plain, skipped = [], 0, True, False  # plain: those kept are the file's first bytes as they stand
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            record = _parse(line)
            round = record.get("round") if isinstance(record, dict) else None
            if type(round) is not int or round < 0:
                wrong.append(f"line {number} is no round's record")
            elif round in found and found[round][1] != record:
                raise ValueError(
                    f"Expected the ledger {path} to hold each round once, found two different records of round "
                    f"{round:,}: {_REMEDY}."
                )
            elif round in found:
                wrong.append(f"line {number} repeats round {round:,}")
            if type(round) is not int or not 0 <= round < rounds or round in found:
                skipped = True
                continue
            plain = plain and not skipped and line.endswith(b"}\n") and round == next(reversed(found), round - 1) + 1
            found[round], size = (line.rstrip(b"\r\n") + b"\n", record), size + len(line)
    held = sorted(found)
    if held and held[0] + len(held) != rounds or wrong and len(held) < rounds or len(held) < least:
        missing = next(round for round in range(rounds) if round not in found)
        raise ValueError(
            f"Expected the ledger {path} to hold each of the {rounds:,} rounds before the checkpoint once, found "
            f"round {missing:,} missing{' (' + wrong[0] + ')' if wrong else ''}: {_REMEDY}."
        )
    records = tuple(found[round][1] for round in held)
    if plain:
        return Kept(path, len(held), size, records=records)
    said = "; ".join(wrong[:3]) or "its lines were not in order, or not ended as they should"
    return Kept(path, len(held), None, tuple(found[round][0] for round in held), records, said)


def _blocks(file: BinaryIO, size: int) -> Iterator[bytes]:
    """The next `size` bytes of a file."""
    while size > 0 and (block := file.read(min(size, _BLOCK))):
        size -= len(block)
        yield block


def _cut(path: str | Path, size: int) -> None:
    """Leave a file's first `size` bytes; one that has no more is not touched."""
    if size < os.path.getsize(path):
        with told(path), open(path, "r+b") as file:
            file.truncate(size)
            os.fsync(file.fileno())


def _replace(path: str | Path, parts: Iterable[bytes]) -> None:
    """Make a file of these parts, in one step."""
    with whole_file(path) as file:
        for part in parts:
            file.write(part)
