"""Checkpoints: complete folders that carry the checksums of their files, and the search for one to resume from.

A checkpoint is written under a name that nothing reads and renamed when it is whole. Its state file says which round
comes next, which run it belongs to, and the checksum of every other file.
"""

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .storage.disk_errors import RESUME, told
from .storage.files import sync_path, sync_tree

logger = logging.getLogger(__name__)

STATE_NAME = "federated_state.json"
SERVER_NAME = "federated_state.safetensors"
FEEDBACK_NAME = "error_feedback"  # folder of files that have their checksums in their names (feedback.py)
_NAME = re.compile(r"checkpoint-\d+")


class CheckpointError(ValueError):
    """A checkpoint that cannot be resumed from."""


@contextmanager
def whole_folder(target: Path, round: int, run: Mapping[str, Any]) -> Iterator[Path]:
    """Yield a folder to write a checkpoint into; on leaving, it gets its state file and becomes `target`.

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
            write_state(partial, round, run)
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


def write_state(folder: Path, round: int, run: Mapping[str, Any], names: Collection[str] | None = None) -> None:
    """Write the state file of a folder that is otherwise whole: the rounds it is of, whose run, and the checksums of
    the files that are resumed from (None: of all)."""
    state = {"format": 1, "round": round, "run": dict(run), "files": checksums(folder, names)}
    (folder / STATE_NAME).write_text(json.dumps(state, indent=1), encoding="utf-8")


def read_state(folder: str | Path, *, verify: bool = True) -> dict[str, Any]:
    """The checkpoint's state file, after checking that every file it names is there and unchanged."""
    folder = Path(folder)
    path = folder / STATE_NAME
    if not path.is_file():
        raise CheckpointError(
            f"Expected a finished checkpoint in {folder}, found no {STATE_NAME}: name a finished one, or pass "
            "resume_from_checkpoint=True to take the latest that is."
        )
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        files, _ = state["files"], state["round"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"Expected a readable {STATE_NAME} in {folder}, found damage ({error}): resume from another checkpoint."
        ) from error
    for name, checksum in files.items() if verify else ():
        found = _checksum(folder / name) if (folder / name).is_file() else "nothing"
        if found != checksum:
            raise CheckpointError(
                f"Expected {folder / name} with the checksum {checksum[:12]}, found {found[:12]}: the file was "
                "damaged or changed; restore it or resume from another checkpoint."
            )
    return state


def last_checkpoint(output_dir: str | Path) -> Path | None:
    """The finished checkpoint with the most rounds (not the most steps, which depend on the layout of processes).

    Unfinished folders are passed over with a warning.
    """
    found: list[tuple[int, Path]] = []
    for folder in sorted(Path(output_dir).glob("*checkpoint-*")):
        if not folder.is_dir():
            continue
        if folder.name.endswith(".partial") or not (folder / STATE_NAME).is_file():
            logger.warning("Passing over the unfinished checkpoint %s.", folder)
        elif folder.name.startswith("checkpoint-"):
            found.append((read_state(folder, verify=False)["round"], folder))
    return max(found)[1] if found else None


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


def rotate(output_dir: str | Path, keep: int | None, best: int | None = None) -> None:
    """Remove all but the `keep` checkpoints with the most rounds; None or 0 keeps all.

    The one of round `best` stays, too, in place of the oldest that would, but never of the latest.

    By rounds, unlike the Trainer's own rotation: steps in folder names depend on the layout of processes. A folder is
    renamed before its files go, so that a crash leaves no checkpoint with files missing.
    """
    folders = [folder for folder in Path(output_dir).glob("checkpoint-*") if _NAME.fullmatch(folder.name)]
    finished = [folder for folder in folders if (folder / STATE_NAME).is_file()]
    finished.sort(key=lambda folder: read_state(folder, verify=False)["round"], reverse=True)
    staying = finished[: keep or None]
    spared = [folder for folder in finished if read_state(folder, verify=False)["round"] == best]
    if spared and spared[0] not in staying:
        staying = [*(staying[:-1] or staying), *spared]
    for folder in (folder for folder in finished if folder not in staying):
        leaving = folder.with_name(f".{folder.name}.partial")
        shutil.rmtree(leaving, ignore_errors=True)
        os.replace(folder, leaving)
        shutil.rmtree(leaving)


def move_aside_later(output_dir: str | Path, round: int) -> None:
    """Keep checkpoints of more than `round` rounds under a name that nothing resumes from or rotates.

    A run that is taken up from an earlier checkpoint writes its own later ones; those of the abandoned branch must
    neither outlive them in a rotation nor be resumed in their place.
    """
    for folder in sorted(Path(output_dir).glob("checkpoint-*")):
        if (folder / STATE_NAME).is_file() and read_state(folder, verify=False)["round"] > round:
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
    """One phrase for everything in which two runs' identities differ."""
    return [
        f"{key} was {saved.get(key)!r} and is {current.get(key)!r}"
        for key in sorted({*saved, *current})
        if saved.get(key) != current.get(key)
    ]


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


def checksums(folder: Path, names: Collection[str] | None = None) -> dict[str, str]:
    """SHA-256 in hex of files below a folder, by their paths there (None: of all but those that carry their own)."""
    found = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    wanted = [name for name in found if (name in names if names is not None else name.split("/")[0] != FEEDBACK_NAME)]
    return {name: _checksum(found[name]) for name in wanted}


def _checksum(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
