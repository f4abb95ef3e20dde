"""The round ledger, `rounds.jsonl`: one JSON object a line, one line a round."""

import json
import os
from pathlib import Path
from typing import Any

LEDGER_NAME = "rounds.jsonl"


def read_ledger(path: str | Path) -> list[dict[str, Any]]:
    """The ledger's rounds in order; a last line torn by a killed run is left out."""
    rounds = []
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            rounds.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number == len(lines):
                break
            raise ValueError(
                f"Expected one JSON object a line in {path}, found something else in line {number}: "
                "restore the file from a copy, or remove that line if its round is not needed."
            ) from error
    return rounds


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
    kept = [record for record in read_ledger(source) if record["round"] < rounds] if source.exists() else []
    temporary = Path(f"{path}.partial")
    temporary.write_text("".join(json.dumps(record, allow_nan=False) + "\n" for record in kept), encoding="utf-8")
    os.replace(temporary, path)
    return len(kept)
