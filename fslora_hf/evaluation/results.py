"""Result files: what was measured, on what, with what, for a machine and a person to read.

An evaluation leaves `<name>.results.json`, its scores and everything they depend on, and `<name>.outcomes.jsonl`, one
line a question.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from datasets import Dataset

from ..common.foreign_text import foreign_text, foreign_value
from ..data.prompts import prompt_hash
from ..models.description import ModelSource
from ..storage.files import make_folder, write_text
from ..storage.result_files import FORMAT, OUTCOMES, RESULTS
from .outcomes import Scores, rows_hash

_PACKAGES = ("fslora_hf", "torch", "transformers", "peft", "datasets", "evaluate", "bitsandbytes")
# What two evaluations must share to be the same one; names of places may differ.
_DEFINING = ("protocol", "settings", "prompt_hash", "rows_hash")
_DEFINING_MODEL = ("digest", "dtype", "quantization")


@dataclass(frozen=True)
class AdapterSource:
    """An adapter: where it came from, the rounds it was trained for if known, and a hash of its tensors."""

    name: str
    digest: str
    revision: str | None = None
    round: int | None = None


@dataclass(frozen=True)
class Subject:
    """What an evaluation is of."""

    name: str  # shown to people
    model: ModelSource
    adapter: AdapterSource | None = None


def identity(subject: Subject, protocol: Any, rows: Dataset) -> dict[str, Any]:
    """Everything that decides the outcomes, up to rounding, as plain JSON values."""
    return {
        "protocol": protocol.name,
        "settings": dict(protocol.settings),
        "prompt_hash": prompt_hash(rows["prompt"]),
        "rows_hash": rows_hash(rows),
        "model": {name: getattr(subject.model, name) for name in _DEFINING_MODEL},
        "adapter": None if subject.adapter is None else subject.adapter.digest,
    }


def make_results(
    subject: Subject,
    protocol: Any,
    rows: Dataset,
    scores: Scores,
    *,
    seed: int,
    seconds: float,
    processes: int,
    batch_size: int,
) -> dict[str, Any]:
    """The content of a result file.

    Args:
        seed: of the choice of rows.
        seconds: that the last attempt took; questions of earlier ones are counted in `resumed`.
    """
    return {
        "format": FORMAT,
        "name": subject.name,
        **identity(subject, protocol, rows),
        "model": asdict(subject.model),
        "adapter": None if subject.adapter is None else asdict(subject.adapter),
        "seed": seed,
        "scores": scores.table(),
        "not_finite": scores.not_finite,
        "tied": scores.tied,
        "versions": versions(),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": round(seconds, 3),
        "resumed": scores.resumed,
        "processes": processes,
        "batch_size": batch_size,
    }


def write_results(folder: str | Path, name: str, results: Mapping[str, Any], scores: Scores) -> Path:
    """Write both files, each in one step, the outcomes first; returns the path of the result file."""
    folder = make_folder(folder)
    lines = (json.dumps(outcome.to_record(), allow_nan=False) + "\n" for outcome in scores.outcomes)
    write_text(folder / f"{name}{OUTCOMES}", "".join(lines))
    content = {**results, "outcomes": f"{name}{OUTCOMES}"}
    path = folder / f"{name}{RESULTS}"
    write_text(path, json.dumps(content, indent=1, allow_nan=False) + "\n")
    return path


def find_results(folder: str | Path, name: str, wanted: Mapping[str, Any]) -> dict[str, Any] | None:
    """The results that stand under this name, None if there are none.

    Raises:
        ValueError: they are of another evaluation than `wanted`, an `identity`.
    """
    path = Path(folder) / f"{name}{RESULTS}"
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        held = {key: found[key] for key in _DEFINING}
        held["model"] = {key: found["model"][key] for key in _DEFINING_MODEL}
        held["adapter"] = found["adapter"] and found["adapter"]["digest"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(
            f"Expected results of this project in {path}, found damage ({foreign_text(error)}): move the file away, "
            "or name another results_dir."
        ) from error
    wanted = json.loads(json.dumps(wanted))
    differing = [f"{key} was {foreign_value(held[key])} and is {foreign_value(wanted[key])}"
                 for key in held if held[key] != wanted[key]]  # fmt: skip
    if differing:
        raise ValueError(
            f"Expected the results in {path} to be of this evaluation, found another's: {'; '.join(differing)}. Name "
            "another results_dir; the file is left as it is."
        )
    return found


def versions() -> dict[str, str]:
    """Of the packages that scores depend on."""
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # run from a checkout that is not installed
            found[package] = "not installed"
    return found
