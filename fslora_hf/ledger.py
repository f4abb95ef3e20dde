"""The round ledger, `rounds.jsonl`: one JSON object a line, one line a round."""

import json
import os
from pathlib import Path
from typing import Any

LEDGER_NAME = "rounds.jsonl"


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
    old one in one step, so that a crash leaves one or the other.
    """
    source = Path(source or path)
    kept = [record for record in read_records(source) if record["round"] < rounds] if source.exists() else []
    temporary = Path(f"{path}.partial")
    with open(temporary, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(record, allow_nan=False) + "\n" for record in kept)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    return len(kept)
