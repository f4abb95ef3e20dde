"""Checkpoints: complete folders that carry the checksums of their files, and the search for one to resume from.

A checkpoint is written under a name that nothing reads and renamed when it is whole. Its state file says which round
comes next, which run it belongs to, and the checksum of every other file.
"""

import json
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..common.foreign_text import foreign_text, foreign_value
from .disk_errors import RESUME, told
from .files import sync_path, sync_tree
from .ledger import LEDGER_NAME, Marker
from .state_file import FEEDBACK_NAME, STATE_NAME, CheckpointError, checksum, checksums, find_state, write_state

__all__ = ["FEEDBACK_NAME", "SERVER_NAME", "STATE_NAME", "CheckpointError", "checksums", "write_state"]

logger = logging.getLogger(__name__)

SERVER_NAME = "federated_state.safetensors"
_NAME = re.compile(r"checkpoint-\d+")
_MOST_TOLD = 30  # differences between two runs


@contextmanager
def whole_folder(target: Path, round: int, run: Mapping[str, Any], ledger: Marker | None = None) -> Iterator[Path]:
    """Yield a folder to write a checkpoint into; on leaving, it gets its state file and becomes `target`.

    The state file marks the ledger beside `target`, by a `ledger` that has marked it before if one is given.

    An error inside leaves `target` and every other checkpoint as they were. A folder already at `target` is replaced
    if it holds the same round of the same run, and otherwise moved aside.
    """
    partial = target.with_name(f".{target.name}.partial")
    replaced = None
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with told(f"the checkpoint {target}", f"{RESUME}; earlier checkpoints are whole"):
            partial.mkdir(parents=True)
            yield partial
            write_state(partial, round, run, ledger=(ledger or Marker(target.parent / LEDGER_NAME)).mark())
            sync_tree(partial)
            replaced = _clear_target(target, round, run)
            os.replace(partial, target)
            sync_path(target.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if replaced is not None and not target.exists():
            os.replace(replaced, target)
        elif replaced is not None:
            shutil.rmtree(replaced, ignore_errors=True)


def read_state(folder: str | Path, *, verify: bool = True) -> dict[str, Any]:
    """The checkpoint's state file, after checking that every file it names is there and unchanged."""
    folder = Path(folder)
    path = folder / STATE_NAME
    if not path.is_file():
        raise CheckpointError(
            f"Expected a finished checkpoint in {folder}, found no {STATE_NAME}: name a finished one, or pass "
            "resume_from_checkpoint=True to take the latest that is."
        )
    state = find_state(folder)
    if not verify:
        return state
    for name, wanted in state["files"].items():
        found = _find_checksum(folder / name)
        if found != wanted:
            raise CheckpointError(
                f"Expected {folder}/{foreign_text(name)} with the checksum {wanted[:12]}, found {found[:12]}: the "
                "file was damaged or changed; restore it or resume from another checkpoint."
            )
    if state["format"] == 1:
        text = (
            "%s is of an earlier format, without a checksum of itself: only what is beside it speaks for its round. "
            "With lora_dropout, other numbers are drawn from here on than that version would have drawn."
        )
        logger.warning(text, path)
    return state


def _find_checksum(path: Path) -> str:
    try:
        return checksum(path) if path.is_file() else "nothing"
    except OSError as error:  # no right to read it, a name too long, a disk that fails
        return error.strerror or "nothing"


def finished_checkpoints(output_dir: str | Path, damaged: list[Path] | None = None) -> list[tuple[int, Path]]:
    """The rounds and folders of the checkpoints that have a readable state file, most rounds first.

    Those whose state file is damaged are passed over with a warning, and added to `damaged` if it is given: they must
    not stand in the way of the others.
    """
    found: list[tuple[int, Path]] = []
    for folder in sorted(Path(output_dir).glob("checkpoint-*")):
        if not (folder / STATE_NAME).is_file():
            continue
        try:
            found.append((find_state(folder)["round"], folder))
        except CheckpointError as error:
            logger.warning("Passing over the checkpoint %s: %s", folder, error)
            if damaged is not None:
                damaged.append(folder)
    return sorted(found, reverse=True)


def last_checkpoint(output_dir: str | Path) -> Path | None:
    """The finished checkpoint with the most rounds (not the most steps, which depend on the layout of processes).

    Unfinished and damaged ones are passed over with a warning.

    Raises:
        CheckpointError: there are damaged ones and no other.
    """
    for folder in sorted(Path(output_dir).glob("*checkpoint-*")):
        if folder.is_dir() and (folder.name.endswith(".partial") or not (folder / STATE_NAME).is_file()):
            logger.warning("Passing over the unfinished checkpoint %s.", folder)
    damaged: list[Path] = []
    found = finished_checkpoints(output_dir, damaged)
    if damaged and not found:
        raise CheckpointError(
            f"Expected a checkpoint with a readable {STATE_NAME} in {output_dir}, found damage in "
            f"{', '.join(folder.name for folder in damaged[:3])} and no other: restore that file from a copy, or "
            "start a new run in another output_dir."
        )
    return found[0][1] if found else None


def find_round(output_dir: str | Path, round: int, run: Mapping[str, Any]) -> Path | None:
    """The finished checkpoint of so many rounds of a run, if there is one; it may have made room for another of the
    same name."""
    folders = sorted(Path(output_dir).glob("checkpoint-*"), key=lambda path: (not _NAME.fullmatch(path.name), path))
    for folder in folders:
        try:
            state = read_state(folder, verify=False)
            if state["round"] == round and state["run"] == run:
                return folder
        except (CheckpointError, KeyError):
            continue
    return None


def rotate(output_dir: str | Path, keep: int | None, proven: int, best: int | None = None) -> None:
    """Remove all but the `keep` checkpoints with the most rounds, and those that are spared.

    By rounds, unlike the Trainer's own rotation: steps in folder names depend on the layout of processes. A folder is
    renamed before its files go, so that a crash leaves no checkpoint with files missing.

    Args:
        keep: as the Trainer's save_total_limit, None or less than 1 keeps all.
        proven: rounds of the newest adapter that is known to be good. If none that stays is of no more rounds, the
            newest that is stays beside them, or the oldest there is: what was learned since may prove worthless.
        best: a round whose checkpoint stays in place of the oldest that would, but never of the latest.
    """
    named = [folder for folder in Path(output_dir).glob("checkpoint-*") if _NAME.fullmatch(folder.name)]
    if keep is None or not 0 < keep < len(named):
        return
    finished = [each for each in finished_checkpoints(output_dir) if _NAME.fullmatch(each[1].name)]
    staying = finished[:keep]
    spared = [each for each in finished if each[0] == best]
    if spared and spared[0] not in staying:
        staying = [*(staying[:-1] or staying), *spared]
    good = [each for each in finished if each[0] <= proven] or finished[-1:]
    if not any(each in staying for each in good):
        staying += good[:1]
    for folder in (each[1] for each in finished if each not in staying):
        leaving = folder.with_name(f".{folder.name}.partial")
        shutil.rmtree(leaving, ignore_errors=True)
        os.replace(folder, leaving)
        shutil.rmtree(leaving)


def proven_checkpoint(output_dir: str | Path, proven: int) -> Path | None:
    """The newest finished checkpoint of no more rounds than are known to be good."""
    finished = finished_checkpoints(output_dir)
    return next((folder for rounds, folder in finished if rounds <= proven and _NAME.fullmatch(folder.name)), None)


def move_aside_later(output_dir: str | Path, round: int) -> None:
    """Keep checkpoints of more than `round` rounds under a name that nothing resumes from or rotates.

    A run that is taken up from an earlier checkpoint writes its own later ones; those of the abandoned branch must
    neither outlive them in a rotation nor be resumed in their place.
    """
    for done, folder in reversed(finished_checkpoints(output_dir)):
        if done > round:
            aside = unused_name(folder.with_name(f"superseded-{folder.name}"))
            logger.warning("%s is of a later round than the one resumed from; it is kept as %s.", folder, aside.name)
            os.replace(folder, aside)


def remove_partial(output_dir: str | Path) -> None:
    """Remove what a killed save or rotation left."""
    for folder in Path(output_dir).glob(".checkpoint-*.partial"):
        shutil.rmtree(folder, ignore_errors=True)


def unused_name(path: Path) -> Path:
    """The path, or one like it that nothing has yet: what is set aside replaces nothing."""
    while path.exists():
        path = path.with_name(f"{path.name}-older")
    return path


def describe_difference(saved: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """One phrase for everything in which two runs' identities differ, the first of many."""
    differing = [key for key in sorted({*saved, *current}) if saved.get(key) != current.get(key)]
    return [
        f"{foreign_text(key)} was {foreign_value(saved.get(key))} and is {foreign_value(current.get(key))}"
        for key in differing[:_MOST_TOLD]
    ] + ([f"{len(differing) - _MOST_TOLD:,} more"] if len(differing) > _MOST_TOLD else [])


def _clear_target(target: Path, round: int, run: Mapping[str, Any]) -> Path | None:
    """Move a folder at `target` out of the way; returns where to if it may be removed once replaced."""
    if not target.exists():
        return None
    try:
        state = read_state(target, verify=False)
        same = state["round"] == round and state["run"] == json.loads(json.dumps(run))
        label = f"round-{state['round']}"
    except CheckpointError:
        same, label = False, "unfinished"
    if same:
        old = target.with_name(f".{target.name}.replaced.partial")
        shutil.rmtree(old, ignore_errors=True)
        os.replace(target, old)
        return old
    aside = unused_name(target.with_name(f"{target.name}-{label}"))
    logger.warning("%s holds another state (%s); it is kept as %s.", target, label, aside.name)
    os.replace(target, aside)
    return None
