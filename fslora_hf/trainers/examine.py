"""What a checkpoint must hold before a run goes on from it: all of it is read and none of it taken.

Whatever comes from another's repository or a failing disk is refused here, while the run's folder is as it was.
"""

import math
import re
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from peft import PeftModel
from transformers.trainer_callback import ExportableState, TrainerState

from ..common.foreign_text import foreign_names, foreign_value
from ..config.federation import FederatedSketchConfig
from ..methods import method_class
from ..models.adapter import global_pair, read_global_pair
from ..models.folding import FOLDED_NAME, FoldedBase
from ..reports.ledger import check_round
from ..rounds.server import ServerState
from ..storage.checkpoint import FEEDBACK_NAME, SERVER_NAME, STATE_NAME, CheckpointError
from ..storage.json_file import DamagedFile, is_whole, kind_of, read_object
from ..storage.ledger import Kept, find_rounds
from ..updates.feedback import INDEX_NAME, check_waiting
from .saving import ADAPTER_CONFIG, ADAPTER_NAME, ARGUMENTS_NAME, TRAINER_STATE, files_to_resume_from

_BY_STEP = re.compile(r"checkpoint-(\d{1,18})")
# As they stand in a file. By the path of a best checkpoint the Trainer loads and deletes; ours keeps the best round.
_FIELDS = {"log_history": (list,), "stateful_callbacks": (dict,), "best_model_checkpoint": (type(None),)}
_LARGEST = 1e300  # of a number in the Trainer's state, which adds to some of them


@dataclass(frozen=True)
class ThisRun:
    """The run that is about to begin, or to go on from a checkpoint that must be of it.

    Args:
        identity: of identity.py.
        model: with the adapter that is trained.
        client_ids: of all clients, ascending.
        keeps_feedback: whether what clients leave out of their updates is kept with checkpoints.
        callbacks: whose states are kept with checkpoints.
        rounds_done: in the model as it is now.
        steps_per_round: of the Trainer, as this run is laid out.
        repository: its own on the Hub.
    """

    args: FederatedSketchConfig
    identity: Mapping[str, Any]
    model: PeftModel
    client_ids: np.ndarray
    keeps_feedback: bool
    callbacks: Sequence[ExportableState]
    rounds_done: int
    steps_per_round: int
    repository: str | None


def examine(run: ThisRun, folder: Path, state: dict[str, Any], ledger: Path) -> Kept:
    """See that a run can go on from a checkpoint whose files have the checksums that its state file names.

    Args:
        state: what the state file says, of this run.
        ledger: of the run that the checkpoint is of.

    Returns:
        What is kept of the ledger.

    Raises:
        CheckpointError: it cannot.
    """
    rounds, args = state["round"], run.args
    if rounds > args.num_rounds:
        raise CheckpointError(
            f"Expected a checkpoint of at most num_rounds={args.num_rounds} rounds, found {rounds} in {folder}: raise "
            "num_rounds, or resume from an earlier checkpoint."
        )
    folds = method_class(args.method).folds
    needed = files_to_resume_from(folds) + [INDEX_NAME] * run.keeps_feedback
    if missing := [name for name in needed if name not in state["files"]]:
        raise CheckpointError(
            f"Expected the checksums of what a run is resumed from in {folder / STATE_NAME}, found none of "
            f"{', '.join(missing)}: resume from another checkpoint."
        )
    read_arguments(folder)
    _check_adapter_config(folder, run.model.peft_config["default"])
    _check_trainer_state(run, folder, state)
    kept = find_rounds(ledger, rounds, state["ledger"])
    for number, record in enumerate(kept.records or (), start=1):
        check_round(record, f"line {number} of {ledger}")
    _check_tensors(run, folder, rounds, folds)
    return kept


def _check_tensors(run: ThisRun, folder: Path, rounds: int, folds: bool) -> None:
    args, pair = run.args, global_pair(run.model)
    read_global_pair(run.model, folder / ADAPTER_NAME)
    ServerState(*pair, args.server_optim, args.resolved_server_learning_rate).read(folder / SERVER_NAME, rounds)
    if folds:
        FoldedBase.of(run.model).read(folder / FOLDED_NAME)
    if run.keeps_feedback:
        check_waiting(folder, rounds, {*run.client_ids.tolist()}, pair)


def read_arguments(folder: Path) -> dict[str, Any]:
    """What a checkpoint's run was told: `num_rounds`, and `per_device_train_clients` as it was laid out.

    Raises:
        CheckpointError: it is damaged.
    """
    try:
        values = read_object(folder / ARGUMENTS_NAME)
        for name in ("num_rounds", "per_device_train_clients"):
            if not is_whole(values.get(name), 1):
                raise DamagedFile(f"{foreign_value(values.get(name), 40)} for {name}")
    except DamagedFile as error:
        raise _damage(folder / ARGUMENTS_NAME, "the arguments of a run", error) from error
    return values


def _check_adapter_config(folder: Path, lora: Any) -> None:
    """The run has its own; this is what PEFT will load the adapter with."""
    try:
        values = read_object(folder / ADAPTER_CONFIG)
        for name in ("peft_type", "r", "lora_alpha", "use_rslora"):
            own = getattr(lora, name)
            if values.get(name) != getattr(own, "value", own):
                raise DamagedFile(f"{foreign_value(values.get(name), 40)} for {name}")
    except DamagedFile as error:
        raise _damage(folder / ADAPTER_CONFIG, "the configuration of this run's adapter", error) from error


def _check_trainer_state(run: ThisRun, folder: Path, state: dict[str, Any]) -> None:
    path = folder / TRAINER_STATE
    try:
        values = read_object(path)
        _check_fields(values)
        if run.args.restore_callback_states_from_checkpoint:
            _check_callbacks(values.get("stateful_callbacks", {}), run.callbacks)
    except DamagedFile as error:
        raise _damage(path, "the state of a Trainer", error) from error
    _check_round(folder, state, values["global_step"], values["epoch"])


def _check_round(folder: Path, state: dict[str, Any], step: int, epoch: float) -> None:
    """See that the round is told alike by the state file, the Trainer's state and the folder's name.

    Steps are those of the layout that wrote them, a whole number for each round; the Trainer's epoch is the round.
    """
    rounds, named = state["round"], _BY_STEP.fullmatch(folder.name)
    agree = epoch == rounds and step >= rounds and step % rounds == 0
    if state["format"] == 1 and (named is None or int(named[1]) != step):  # stopped within the round after
        agree = rounds <= epoch <= rounds + 1
    if not agree or named and int(named[1]) % rounds:
        raise CheckpointError(
            f"Expected {folder.name} and the state files in it to tell of the same round, found round {rounds:,} in "
            f"{STATE_NAME}, and step {step:,} of round {epoch:,g} in {TRAINER_STATE}: resume from another checkpoint."
        )


def _check_fields(values: dict[str, Any]) -> None:
    """See that the values are of the fields of a TrainerState, and of their types."""
    hints = typing.get_type_hints(TrainerState)
    if unknown := {*values} - {*hints}:
        raise DamagedFile(f"{foreign_names(unknown)}, which it does not have")
    if missing := {"global_step", "epoch"} - {*values}:
        raise DamagedFile(f"no {foreign_names(missing)}")
    for name, value in values.items():
        if not any(_is_a(value, kind) for kind in _FIELDS.get(name) or typing.get_args(hints[name]) or [hints[name]]):
            raise DamagedFile(f"{foreign_value(value, 40)} for {name}")
    for row in values.get("log_history") or ():
        if not isinstance(row, dict):
            raise DamagedFile(f"{kind_of(row)} for a log entry")
        if any(not _is_a(row.get(name, 0), float) for name in ("step", "epoch")):
            raise DamagedFile("a log entry of no step")
        if not isinstance(row.get("eval_loss", 0.0), (int, float)) or any(map(_is_deep, row.values())):
            raise DamagedFile("a log entry that holds no numbers")


def _is_deep(value: Any) -> bool:
    """Whether a log's value is neither a number nor a short text; callbacks may log lists of such."""
    return isinstance(value, dict) or isinstance(value, list) and any(isinstance(v, (list, dict)) for v in value)


def _is_a(value: Any, kind: Any) -> bool:
    if kind in (int, float):
        return (
            type(value) is int
            and abs(value) < 2**63
            or (type(value) is float and kind is float and math.isfinite(value) and abs(value) < _LARGEST)
        )
    if kind in (bool, str, type(None)):
        return isinstance(value, kind)
    return isinstance(value, typing.get_origin(kind) or kind)


def _check_callbacks(saved: Any, callbacks: Sequence[ExportableState]) -> None:
    """See that what is set on callbacks is what callbacks of their names have saved."""
    own = {type(each).__name__: each.state() for each in callbacks}
    for name, states in saved.items():
        for each in (states if isinstance(states, list) else [states]) if name in own else ():
            for part in ("args", "attributes"):
                if not isinstance(each, dict) or {*each.get(part, {})} != {*own[name].get(part, {})}:
                    raise DamagedFile(f"another state of the callback {name}")


def _damage(path: Path, what: str, found: Exception) -> CheckpointError:
    return CheckpointError(
        f"Expected {what} in {path}, found damage ({found}): restore it or resume from another checkpoint."
    )


def check_place(output_dir: Path, keeps_feedback: bool) -> None:
    """See that what a run keeps in its folder beside checkpoints can be put there.

    Raises:
        ValueError: something of another kind is in its place.
    """
    folder = output_dir / FEEDBACK_NAME
    if keeps_feedback and (folder.is_symlink() or folder.exists() and not folder.is_dir()):
        raise ValueError(
            f"Expected {folder} to be free for what clients leave out of their updates, found something else there: "
            "move it away."
        )
