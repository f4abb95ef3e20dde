"""Where a call of `train()` starts: anew, or from a checkpoint of the same run."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

from ..common.foreign_text import foreign_value
from ..common.settings import written
from ..config.decides import where
from ..hub.fetch import fetch_round, parse_source, take_in
from ..hub.outbox import OUTBOX_NAME
from ..storage.checkpoint import (
    CheckpointError,
    describe_difference,
    last_checkpoint,
    move_aside_later,
    read_state,
    remove_partial,
)
from ..storage.files import make_folder, write_text
from ..storage.json_file import DamagedFile, read_object
from ..storage.ledger import LEDGER_NAME, Kept, keep_rounds
from ..storage.result_files import IN_LOOP, set_aside_later
from .examine import ThisRun, check_place, examine, read_arguments
from .identity import completed

logger = logging.getLogger(__name__)

IDENTITY_NAME = "federated_run.json"
HUB_RESUME = ".hub_resume"  # in output_dir, while a run is taken up from the Hub


class OccupiedError(ValueError):
    """There is a run where another one was to begin."""


def find_start(run: ThisRun, resume: str | bool | None) -> str | None:
    """The folder of the checkpoint to resume from, None to start anew; leaves the run's folder ready for either.

    Raises:
        ValueError: the folder holds another run, there is nothing to resume from, or it is of another run or damaged.
    """
    output_dir = Path(run.args.output_dir)
    try:
        return _find_start(run, resume, output_dir)
    finally:
        shutil.rmtree(output_dir / HUB_RESUME, ignore_errors=True)


def _find_start(run: ThisRun, resume: str | bool | None, output_dir: Path) -> str | None:
    if not resume:
        refuse_occupied(output_dir)
        _begin(run, output_dir)
        return None
    fetched = _fetch(run, str(resume), output_dir)
    folder = last_checkpoint(output_dir) if resume is True else fetched or Path(resume)
    if folder is None:
        return _start_over(run, output_dir)
    state = read_state(folder)
    _refuse_other_run(folder, state["run"], run)
    elsewhere = folder.resolve().parent != output_dir.resolve()
    if elsewhere and fetched is None:
        refuse_occupied(output_dir)
    kept = examine(run, folder, state, (folder.parent if elsewhere else output_dir) / LEDGER_NAME)
    check_place(output_dir, run.keeps_feedback)
    _tell_of_ledger(run, folder, state["round"], kept)
    _warn_of_other_length(run, folder)
    _warn_of_other_rounding(run, folder)
    # Nothing is refused from here on.
    if not elsewhere:
        move_aside_later(output_dir, state["round"])
        set_aside_later(output_dir / IN_LOOP, state["round"])
    _begin(run, output_dir)
    kept.write(output_dir / LEDGER_NAME)
    if fetched is not None:
        folder = take_in(fetched, output_dir, f"checkpoint-{state['round'] * run.steps_per_round}")
    return str(folder)


def _tell_of_ledger(run: ThisRun, folder: Path, rounds: int, kept: Kept) -> None:
    if kept.rounds < rounds and run.args.upload_budget is not None:
        raise CheckpointError(
            f"Expected the {rounds} rounds before {folder} in a ledger beside it, which says how much of "
            f"upload_budget is spent, found {kept.rounds}: copy {LEDGER_NAME} with the checkpoint, or remove "
            "upload_budget."
        )
    if kept.rounds < rounds:
        logger.warning("The ledger holds %d of the %d rounds before %s.", kept.rounds, rounds, folder)
    if kept.mended:
        text = "The ledger %s was mended, every round before %s is in it once: %s."
        logger.warning(text, kept.path, folder, kept.mended)


def _fetch(run: ThisRun, resume: str, output_dir: Path) -> Path | None:
    """The folder of a checkpoint that is named by its place on the Hub, None if it is not."""
    args = run.args
    source = parse_source(resume, run.repository or args.hub_model_id, args.hub_revision)
    if source is None:
        return None
    # A ledger beside our own folder is what a kill left of an earlier call that took the run up.
    refuse_occupied(output_dir, besides_ledger=(output_dir / HUB_RESUME).exists())
    return fetch_round(*source, output_dir / HUB_RESUME, args.hub_token)


def saved_block(checkpoint: str | None) -> int | None:
    """How many clients shared a step before a checkpoint was written; None without a checkpoint."""
    if checkpoint is None:
        return None
    return read_arguments(Path(checkpoint))["per_device_train_clients"]


def _warn_of_other_length(run: ThisRun, folder: Path) -> None:
    """A run may be made longer, but a schedule that ends with the run then takes other rates from here on."""
    args = run.args
    saved = read_arguments(folder)["num_rounds"]
    if saved != args.num_rounds and not str(args.lr_scheduler_type.value).startswith("constant"):
        text = "The run was begun with num_rounds=%s and goes on with %s: its %s schedule differs from here on."
        logger.warning(text, saved, args.num_rounds, args.lr_scheduler_type.value)


def _warn_of_other_rounding(run: ThisRun, folder: Path) -> None:
    """A run may go on where another precision is to be had, and its numbers are then rounded otherwise."""
    saved, now = read_arguments(folder), json.loads(json.dumps(written(run.args), default=str))
    names = where([type(run.args)], lambda each: each.decides == "speed" and each.compared)
    changed = [f"{name} {foreign_value(saved[name], 40)} and goes on with {foreign_value(now[name], 40)}"
               for name in names if name in saved and saved[name] != now[name]]  # fmt: skip
    if changed:
        text = "The run was begun with %s: from here on, its numbers are rounded otherwise."
        logger.warning(text, "; ".join(changed))


def _begin(run: ThisRun, output_dir: Path) -> None:
    make_folder(output_dir)
    remove_partial(output_dir)
    write_text(output_dir / IDENTITY_NAME, json.dumps(run.identity, indent=1) + "\n")


def _start_over(run: ThisRun, output_dir: Path) -> None:
    """Begin again at round 0 if the folder holds this very run, killed before its first checkpoint."""
    if run.rounds_done:
        raise CheckpointError(
            f"Expected the initial adapter to begin again with, found one of {run.rounds_done} rounds and no "
            "checkpoint: build the trainer anew, or name another output_dir."
        )
    path = output_dir / IDENTITY_NAME
    if not path.is_file():
        raise CheckpointError(
            f"Expected a finished checkpoint in {output_dir}, found none: start without resume_from_checkpoint, or "
            "name the folder of a checkpoint."
        )
    try:
        saved = read_object(path)
    except DamagedFile as error:
        raise CheckpointError(
            f"Expected the settings of the run that was begun here in {path}, found damage ({error}): start without "
            "resume_from_checkpoint in another output_dir, or remove this one."
        ) from error
    _refuse_other_run(output_dir, saved, run)
    check_place(output_dir, run.keeps_feedback)
    logger.warning("No finished checkpoint in %s; the run begins again at its first round.", output_dir)
    keep_rounds(output_dir / LEDGER_NAME, 0)
    set_aside_later(output_dir / IN_LOOP, 0)


def refuse_occupied(
    output_dir: Path, besides_ledger: bool = False, resuming: str = "trainer.train(resume_from_checkpoint=True)"
) -> None:
    """Only a resumed run may write where a run has written; `resuming` is how one is resumed.

    Raises:
        OccupiedError: there is one.
    """
    ledger = output_dir / LEDGER_NAME
    found = [LEDGER_NAME] if not besides_ledger and ledger.exists() and ledger.stat().st_size else []
    found += sorted(path.name for path in [*output_dir.glob("checkpoint-*"), *output_dir.glob(IN_LOOP)])
    found += sorted(f"{OUTBOX_NAME}/{path.name}" for path in (output_dir / OUTBOX_NAME).glob("round-*"))
    if found:
        raise OccupiedError(
            f"Expected an output_dir without a run, found {', '.join(found[:3])} in {output_dir}: resume that run "
            f"with {resuming}, or choose another output_dir."
        )


def _refuse_other_run(where: Path, saved: dict[str, Any], run: ThisRun) -> None:
    differences = describe_difference(completed(saved, run.args), completed(run.identity, run.args))
    if differences:
        raise CheckpointError(
            f"Expected a checkpoint of this run, found another's in {where}: {'; '.join(differences)}. Use the "
            "settings and data of that run, or start a new one in another output_dir."
        )
