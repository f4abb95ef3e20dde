"""Names and forms of result files, for what reads them without a model at hand (evaluation/results.py writes them)."""

import os
import re
from collections.abc import Sequence
from pathlib import Path

from .checkpoint import unused_name

FORMAT = 1
IN_LOOP = "eval_rounds"  # folder in output_dir of what is scored during training
PROTOCOLS = ("loglikelihood", "generate")
RESULTS, OUTCOMES = ".results.json", ".outcomes.jsonl"


def slug(parts: Sequence[str]) -> str:
    """A file name out of some words."""
    return re.sub(r"[^\w.-]+", "-", "-".join(parts)).strip("-.")


def set_aside_later(folder: str | Path, round: int) -> None:
    """Rename result files of more than `round` rounds: no leaderboard shall take an abandoned branch for the run."""
    for path in sorted(Path(folder).glob(f"round-*{RESULTS}")):
        number = path.name.removeprefix("round-").split(".")[0]
        if number.isdigit() and int(number) > round:
            for old in (path, path.with_name(path.name.removesuffix(RESULTS) + OUTCOMES)):
                if old.exists():
                    os.replace(old, unused_name(old.with_name(f"{old.name}.superseded")))
