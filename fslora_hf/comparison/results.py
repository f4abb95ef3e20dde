"""What a run left in its folder: how far it is, its curve, its totals, and what it was trained and scored on."""

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..common.foreign_text import foreign_value
from ..launch import FIGURE_NAME
from ..reports.ledger import read_ledger, totals
from ..storage.checkpoint import last_checkpoint
from ..storage.ledger import LEDGER_NAME, read_records
from ..storage.result_files import IN_LOOP, RESULTS
from ..trainers.resume import IDENTITY_NAME
from .runs import PARTITION, Run

# What two runs with one scoring have alike in their result files.
_SCORING = ("protocol", "settings", "prompt_hash")
_MODEL = ("name", "dtype", "quantization")


@dataclass(frozen=True)
class Point:
    """One evaluation of a run: rounds finished, bytes its clients had sent by then, and scores, None if not taken."""

    round: int
    bytes_up: int
    loss: float | None
    accuracy: float | None


@dataclass(frozen=True)
class Result:
    """A finished run.

    Args:
        points: its evaluations in order; the last one is after the last round.
        totals: sums over its ledger, as of `report.totals`.
        rank_losses: rank -> mean training loss of its clients over the second half of the rounds, clients alike.
        short_of_budget: it has reached its number of rounds before its upload budget.
        identity: what the run says of its own data and model.
        scoring: identities in its last result file, None if only the loss was taken.
        majority_rate: accuracy of always giving a task's most common answer, None if only the loss was taken.
    """

    run: Run
    points: tuple[Point, ...]
    totals: dict[str, Any]
    rank_losses: dict[int, float]
    short_of_budget: bool
    identity: dict[str, Any]
    scoring: dict[str, Any] | None
    majority_rate: float | None


def rounds_and_bytes(folder: Path) -> tuple[int, int]:
    """Rounds in the ledger of a run, and the bytes its clients sent in them."""
    path = folder / LEDGER_NAME
    records = read_records(path) if path.is_file() else []
    return len(records), sum(record["bytes_up"] for record in records)


def share_done(run: Run, folder: Path) -> float:
    """How much of a run's budget is spent, 0 to 1."""
    rounds, sent = rounds_and_bytes(folder)
    budget = upload_budget(run)
    shares = [rounds / run.args.num_rounds, 0.0 if budget is None else sent / budget]
    return min(1.0, max(shares))


def upload_budget(run: Run) -> float | None:
    """In bytes; None at equal rounds."""
    megabytes = run.settings.get("upload_budget")
    return None if megabytes is None else megabytes * 1e6


def is_started(folder: Path) -> bool:
    return (folder / IDENTITY_NAME).is_file()


def is_done(run: Run, folder: Path) -> bool:
    """Whether all rounds are in the ledger, the last one's checkpoint and evaluation are there, and so is the figure,
    which is written last."""
    if not is_started(folder) or share_done(run, folder) < 1 or not (folder / FIGURE_NAME).is_file():
        return False
    rounds = rounds_and_bytes(folder)[0]
    row = next((row for row in _evaluations(folder) if row[0] == rounds), None)
    # A checkpoint is written after its round's evaluation, so that the row says whether a result file belongs to it.
    return row is not None and ("eval_accuracy" not in row[1] or _result_file(folder, rounds) is not None)


def _evaluations(folder: Path) -> list[tuple[int, dict[str, Any]]]:
    """(rounds finished, what the trainer logged) of each evaluation up to the last checkpoint."""
    checkpoint = last_checkpoint(folder)
    if checkpoint is None:
        return []
    history = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    return [(round(row["epoch"]), row) for row in history if "eval_loss" in row]


def _result_file(folder: Path, rounds: int) -> Path | None:
    return next(iter(sorted((folder / IN_LOOP).glob(f"round-{rounds:04d}.*{RESULTS}"))), None)


def read_run(run: Run, folder: Path) -> Result:
    """A run that `is_done`.

    Raises:
        ValueError, OSError: a file is damaged or missing.
    """
    records = read_ledger(folder / LEDGER_NAME)
    sent = [0]
    for record in records:
        sent.append(sent[-1] + record["bytes_up"])
    budget, file = upload_budget(run), _result_file(folder, len(records))
    # After a resume, a round that was evaluated twice has its last row count.
    rows = {done: row for done, row in _evaluations(folder) if done <= len(records)}
    scores = None if file is None else json.loads(file.read_text(encoding="utf-8"))
    return Result(
        run=run,
        points=tuple(
            Point(done, sent[done], row["eval_loss"], row.get("eval_accuracy")) for done, row in sorted(rows.items())
        ),
        totals=totals(records),
        rank_losses=_rank_losses(records),
        short_of_budget=budget is not None and sent[-1] < budget,
        identity=json.loads((folder / IDENTITY_NAME).read_text(encoding="utf-8")),
        scoring=scores and _scoring(scores),
        majority_rate=scores and _majority_rate(scores),
    )


def _rank_losses(records: Sequence[dict[str, Any]]) -> dict[int, float]:
    found = defaultdict(list)
    for record in records[len(records) // 2 :]:
        for rank, loss, weight in zip(record["ranks"], record["losses"], record["weights"], strict=True):
            if loss is not None and weight > 0:
                found[rank].append(loss)
    return {rank: sum(losses) / len(losses) for rank, losses in sorted(found.items())}


def _scoring(results: dict[str, Any]) -> dict[str, Any]:
    found = {name: results[name] for name in (*_SCORING, "rows_hash")}
    return found | {f"model {name}": results["model"][name] for name in _MODEL}


def _majority_rate(results: dict[str, Any]) -> float:
    return next(
        line["majority_rate"]
        for line in results["scores"]
        if (line["task"], line["metric"]) == ("average", "accuracy")
    )


def check_alike(results: Sequence[Result]) -> None:
    """Refuse runs that differ in data or scoring, by what stands in their own files.

    All must have the same model, protocol and wording; those of one seed the same scored rows (another seed may draw
    others, and differences are taken within a seed); those of one seed and one way to split the same training rows
    with the same owners.

    Raises:
        ValueError: two runs differ.
    """
    for result in results[1:]:
        first = results[0]
        _same(first, result, "the model", first.identity.get("model"), result.identity.get("model"))
        _same(first, result, "the kind of scoring", first.scoring is None, result.scoring is None)
        for name in () if first.scoring is None else first.scoring.keys() - {"rows_hash"}:
            _same(first, result, name, first.scoring[name], result.scoring[name])
    by_seed: dict[Any, Result] = {}
    by_split: dict[Any, Result] = {}
    for result in results:
        seed = result.run.seed
        first = by_seed.setdefault(seed, result)
        if result.scoring is not None:
            _same(first, result, "the scored rows", first.scoring["rows_hash"], result.scoring["rows_hash"])
        split = json.dumps([seed, *(result.run.setting(name) for name in PARTITION)], default=str)
        first = by_split.setdefault(split, result)
        _same(first, result, "the training rows of each client", first.identity["data"], result.identity["data"])


def _same(first: Result, other: Result, what: str, expected: Any, found: Any) -> None:
    if expected != found:
        raise ValueError(
            f"Expected runs with the same data and scoring, found {what} to be {foreign_value(expected)} in "
            f"{first.run.name} and {foreign_value(found)} in {other.run.name}: remove the folder of the one that is "
            "wrong, and compare again."
        )
