"""`federated_state.json`: the round and the run that a checkpoint is of, the checksums of its files and of itself."""

import hashlib
import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from ..common.foreign_text import foreign_text, foreign_value
from .json_file import DamagedFile, is_whole, kind_of, read_object

STATE_NAME = "federated_state.json"
FEEDBACK_NAME = "error_feedback"  # folder of files that have their checksums in their names (updates/feedback.py)
FORMAT = 2  # 1 had no checksum of itself, and no word of the ledger
_KEYS = {1: {"format", "round", "run", "files"}, 2: {"format", "round", "run", "files", "ledger", "digest"}}
_CHECKSUM = re.compile(r"[0-9a-f]{64}")
_MOST_FILES = 10_000


class CheckpointError(ValueError):
    """A checkpoint that cannot be resumed from."""


def write_state(
    folder: Path,
    round: int,
    run: Mapping[str, Any],
    names: Collection[str] | None = None,
    ledger: Mapping[str, Any] | None = None,
) -> None:
    """Write the state file of a folder that is otherwise whole.

    Args:
        round: rounds that are done.
        run: whose, an identity.
        names: of the files that are resumed from, whose checksums it holds (None: all).
        ledger: what ledger.py's `mark` says of the ledger of these rounds, if it lies elsewhere.
    """
    state = {"format": FORMAT, "round": round, "run": dict(run), "files": checksums(folder, names), "ledger": ledger}
    state["digest"] = digest(state)
    (folder / STATE_NAME).write_text(json.dumps(state, indent=1), encoding="utf-8")


def digest(state: Mapping[str, Any]) -> str:
    """SHA-256 in hex of all that a state file says beside this."""
    said = {key: value for key, value in state.items() if key != "digest"}
    return hashlib.sha256(json.dumps(said, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def parse_state(path: Path) -> dict[str, Any]:
    """What a state file says, of this format or the one before.

    Raises:
        DamagedFile: it is not whole.
    """
    state = read_object(path)
    try:
        _check_format(state)
    except RecursionError:
        raise DamagedFile("values nested too deep") from None
    if not is_whole(state["round"], 1):
        raise DamagedFile(f"{foreign_value(state['round'], 40)} for a round")
    for key in ("run", "files"):
        if not isinstance(state[key], dict):
            raise DamagedFile(f"{kind_of(state[key])} for {key}")
    if len(state["files"]) > _MOST_FILES:
        raise DamagedFile(f"{len(state['files']):,} files")
    for name, checksum in state["files"].items():
        _check_file(name, checksum)
    _check_mark(state.setdefault("ledger", None))
    return state


def find_state(folder: Path) -> dict[str, Any]:
    """What the state file of a checkpoint says.

    Raises:
        CheckpointError: it is damaged.
    """
    try:
        return parse_state(folder / STATE_NAME)
    except DamagedFile as error:
        raise CheckpointError(
            f"Expected a readable {STATE_NAME} in {folder}, found damage ({error}): resume from another checkpoint."
        ) from error


def _check_format(state: Mapping[str, Any]) -> None:
    version = state.get("format")
    if type(version) is not int or version not in _KEYS:
        raise DamagedFile(
            f"the format {foreign_value(version, 40)}, of {' and '.join(map(str, _KEYS))} that are known"
        )
    if state.keys() != _KEYS[version]:
        named = ", ".join(foreign_text(key, 40) for key in sorted(state.keys() ^ _KEYS[version])[:3])
        raise DamagedFile(f"keys missing or too many: {named}")
    if version > 1 and state["digest"] != digest(state):
        raise DamagedFile("its checksum is not that of its content")


def _check_file(name: str, checksum: Any) -> None:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not path.parts or "\\" in name or not name.isprintable():
        raise DamagedFile(f"the path {foreign_value(name)}, which leads out of the folder")
    if not isinstance(checksum, str) or not _CHECKSUM.fullmatch(checksum):
        raise DamagedFile(f"{foreign_value(checksum, 80)} for the checksum of {foreign_text(name)}")


def _check_mark(mark: Any) -> None:
    if mark is None:
        return
    if not isinstance(mark, dict) or mark.keys() != {"rounds", "bytes", "sha256"}:
        raise DamagedFile("no such mark of a ledger")
    if not is_whole(mark["rounds"]) or not is_whole(mark["bytes"]) or not isinstance(mark["sha256"], str):
        raise DamagedFile("a mark of a ledger with other values")


def checksums(folder: Path, names: Collection[str] | None = None) -> dict[str, str]:
    """SHA-256 in hex of files below a folder, by their paths there (None: of all but those that carry their own)."""
    found = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    wanted = [name for name in found if (name in names if names is not None else name.split("/")[0] != FEEDBACK_NAME)]
    return {name: checksum(found[name]) for name in wanted}


def checksum(path: Path) -> str:
    """SHA-256 in hex of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
