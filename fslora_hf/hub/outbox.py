"""The outbox: rounds that are to be pushed to the Hub, as immutable snapshots on disk. It knows no network.

A snapshot is a folder `round-0010` that holds the tree to commit in `files/` and its record in `push.json`. It is made
under a name that nothing reads and renamed when it is whole. Once pushed, its files go and the record stays.
"""

import errno
import hashlib
import json
import logging
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..common.foreign_text import foreign_text, foreign_value
from ..common.settings import is_a
from ..storage.checkpoint import checksums
from ..storage.disk_errors import told
from ..storage.files import make_folder, sync_path, sync_tree, write_text
from ..storage.locks import lock_file

logger = logging.getLogger(__name__)

OUTBOX_NAME = "hub_outbox"
_RECORD, _FILES, _FIGURES, _TARGET = "push.json", "files", "figures", "target.json"
_NAME = re.compile(r"round-[0-9]{4,18}")
_SUM, _COMMIT = re.compile(r"[0-9a-f]{64}"), re.compile(r"\w{1,64}")
_WEIGHTS = "adapter_model.safetensors"
_RESERVE = 4  # times a snapshot's size stay free
_THREADS = threading.RLock()


@dataclass(frozen=True)
class Snapshot:
    """One round as it is, or was, to be committed.

    Attributes:
        digest: SHA-256, in hex, of the tag and of all paths and contents; what a commit is recognised by.
        weights: SHA-256, in hex, of the adapter's weights alone: a round that is trained again has the same.
        status: "pending"; "pushed" once the commit and its tag are on the Hub; "damaged" if its record is; "lost" if
            there is none, because it could not be kept.
        sent: a commit of it may have reached the Hub.
        commit: its commit id, once pushed.
    """

    round: int
    tag: str
    folder: Path
    digest: str
    weights: str
    status: str = "pending"
    sent: bool = False
    commit: str | None = None

    @property
    def message(self) -> str:
        """The title of its commit."""
        return f"Round {self.round}"

    @property
    def tree(self) -> Path:
        """The folder to commit; gone when pushed."""
        return self.folder / _FILES

    @property
    def figures(self) -> Path:
        """The folder of what is drawn for the commit when it is made; gone when pushed."""
        return self.folder / _FIGURES

    @property
    def files(self) -> list[Path]:
        """The files to commit, relative to `tree`."""
        return sorted(path.relative_to(self.tree) for path in self.tree.rglob("*") if path.is_file())


class Outbox:
    """The snapshots in `folder`, which is made if need be.

    Args:
        tidy: remove what a kill left unfinished. Whoever reads beside the process that adds must not.
    """

    def __init__(self, folder: str | Path, tidy: bool = True):
        self.folder = Path(folder)
        make_folder(self.folder)
        with self._locked():
            for old in self.folder.glob(".round-*.replaced"):
                target = self.folder / old.name[1:].removesuffix(".replaced")
                if not target.exists():  # killed between the two renames of a replacement
                    os.replace(old, target)
                elif tidy:
                    shutil.rmtree(old, ignore_errors=True)
        for partial in self.folder.glob(".round-*.partial") if tidy else ():
            shutil.rmtree(partial, ignore_errors=True)
        for snapshot in self.all() if tidy else ():
            if snapshot.status == "pushed":
                _free(snapshot)

    def add(self, round: int, fill: Callable[[Path], None]) -> Snapshot:
        """Keep a round for pushing: `fill` writes the tree to commit into the folder it is given, and may leave notes
        beside that folder.

        A round that is added again replaces a pending snapshot of other content, unless that may be on the Hub
        already: then the first one stands, because a tag never moves. `fill` may link to files that nobody writes to.
        Room is left on the disk for the checkpoints of a run that pushes nothing for a while.

        Raises:
            WriteError: the disk failed, or is full or nearly so; nothing of the snapshot is left.
        """
        name = f"round-{round:04d}"
        partial = self.folder / f".{name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        try:
            with told(f"round {round} for pushing into {self.folder}", "later rounds are pushed; this one is not"):
                (partial / _FILES).mkdir(parents=True)
                fill(partial / _FILES)
                made = _describe(round, name, partial)
                _check_room(partial)
                _write_json(partial / _RECORD, _record(made))
                sync_tree(partial)
                with self._locked():
                    return self._keep(made, self.folder / name)
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def all(self) -> list[Snapshot]:
        """Every snapshot, in order of rounds."""
        folders = [path for path in self.folder.glob("round-*") if _NAME.fullmatch(path.name)]
        return sorted(map(_read, folders), key=lambda snapshot: snapshot.round)

    def pending(self) -> list[Snapshot]:
        """The snapshots that are not on the Hub yet, in order of rounds."""
        return [snapshot for snapshot in self.all() if snapshot.status == "pending"]

    def holds(self, round: int) -> bool:
        """Whether there is a snapshot of a round, pushed or not."""
        return (self.folder / f"round-{round:04d}").exists()

    def get(self, round: int) -> Snapshot:
        """The snapshot of a round as it now stands on disk."""
        return _read(self.folder / f"round-{round:04d}")

    def is_whole(self, snapshot: Snapshot) -> bool:
        """Whether the files are those that were kept: a link to a checkpoint sees what anyone does to its files."""
        try:
            found = _describe(snapshot.round, snapshot.tag, snapshot.folder)
        except FileNotFoundError:
            return False
        return found.digest == snapshot.digest

    def claim(self, snapshot: Snapshot) -> bool:
        """Note, before a commit is sent, that it may land; from here on the snapshot is not replaced.

        Returns whether it still stands as given, with the files that were kept.
        """
        with self._locked():
            if _read(snapshot.folder) != snapshot or not self.is_whole(snapshot):
                return False
            _write_json(snapshot.folder / _RECORD, _record(snapshot) | {"sent": True})
            return True

    def release(self, snapshot: Snapshot) -> None:
        """Note that no commit of it has landed or will: the Hub has refused it."""
        with self._locked():
            there = _read(snapshot.folder)
            if there.status == "pending" and there.digest == snapshot.digest:
                _write_json(snapshot.folder / _RECORD, _record(there) | {"sent": False})

    def mark_pushed(self, snapshot: Snapshot, commit: str) -> None:
        """Note that the round is on the Hub, then free its files."""
        pushed = {"status": "pushed", "sent": True, "commit": commit}
        with self._locked():
            _write_json(snapshot.folder / _RECORD, _record(snapshot) | pushed)
        _free(snapshot)  # what is left goes when the outbox is next opened

    def write_target(self, repo_id: str, revision: str, private: bool | None) -> None:
        """Note where the rounds go, for whoever pushes later. A token is never written."""
        _write_json(self.folder / _TARGET, {"repo_id": repo_id, "revision": revision, "private": private})

    def read_target(self) -> dict[str, Any]:
        """What `write_target` noted: its arguments by name.

        Raises:
            ValueError: there is no such note, or it is damaged.
        """
        path = self.folder / _TARGET
        try:
            target = json.loads(path.read_text(encoding="utf-8"))
            noted = {name: target[name] for name in ("repo_id", "revision", "private")}
            whole = all(isinstance(noted[name], str) and noted[name].isprintable() for name in ("repo_id", "revision"))
            if whole and (noted["private"] is None or isinstance(noted["private"], bool)):
                return noted
            found = f"damage ({foreign_value(noted)})"
        except FileNotFoundError:
            found = "none"
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            found = f"damage ({type(error).__name__}: {foreign_text(error)})"
        raise ValueError(
            f"Expected the repository that the rounds go to in {path}, found {found}: name the output_dir of a run "
            "that pushes rounds, or name the repository."
        )

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Nobody else changes which snapshots there are, and what they say: not this process's other threads, nor
        recipes/push.py beside a run."""
        with _THREADS, told(self.folder / ".lock"):
            file = open(self.folder / ".lock", "w")  # noqa: SIM115  (closed by the next line)
        with _THREADS, file:
            lock_file(file.fileno(), wait=True)  # where there are no locks, recipes/push.py is for after the run
            yield

    def _keep(self, made: Snapshot, target: Path) -> Snapshot:
        """Move a whole snapshot to its place, or leave the one that is there; returns which stands."""
        if not target.exists():
            os.replace(made.folder, target)
        else:
            there = _read(target)
            stands = there.status == "pushed" or self.is_whole(there)
            if stands and (there.sent or there.digest == made.digest):
                _warn_of_other_weights(there, made)
                return there
            old = target.with_name(f".{target.name}.replaced")
            shutil.rmtree(old, ignore_errors=True)
            os.replace(target, old)
            try:
                os.replace(made.folder, target)
            except OSError:
                os.replace(old, target)
                raise
            shutil.rmtree(old, ignore_errors=True)  # what is left goes when the outbox is next opened
        sync_path(self.folder)
        return _read(target)


def _check_room(folder: Path) -> None:
    """Raises OSError if a snapshot leaves less room than a few checkpoints need."""
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    if shutil.disk_usage(folder).free < _RESERVE * size:
        raise OSError(errno.ENOSPC, "less room on the disk than the run's checkpoints may need")


def _free(snapshot: Snapshot) -> None:
    for folder in (snapshot.tree, snapshot.figures):
        shutil.rmtree(folder, ignore_errors=True)


def _warn_of_other_weights(there: Snapshot, made: Snapshot) -> None:
    if there.weights != made.weights:
        logger.warning(
            "Expected round %d with the weights that were sent to the Hub before, found others: %s stays as it was "
            "sent; to push this run's, choose another hub_model_id and output_dir.",
            there.round,
            there.tag,
        )


def _describe(round: int, tag: str, folder: Path) -> Snapshot:
    """The record of a snapshot that has just been filled."""
    sums = checksums(folder / _FILES)
    # The tag is part of the digest: two rounds of equal content are two commits.
    return Snapshot(round, tag, folder, _digest({"tag": tag, "files": sums}), sums.get(_WEIGHTS, ""))


def _digest(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _record(snapshot: Snapshot) -> dict[str, Any]:
    names = ("round", "tag", "message", "digest", "weights", "status", "sent", "commit")
    return {"format": 1} | {name: getattr(snapshot, name) for name in names}


def _read(folder: Path) -> Snapshot:
    try:
        record = json.loads((folder / _RECORD).read_text(encoding="utf-8"))
        names = ("round", "tag", "digest", "weights", "status", "sent", "commit")
        made = Snapshot(folder=folder, **{name: record[name] for name in names})
        if _is_record(made):
            return made
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        pass
    return Snapshot(_number(folder), folder.name, folder, "", "", status="damaged")


def _number(folder: Path) -> int:
    return int(folder.name.removeprefix("round-"))


def _is_record(made: Snapshot) -> bool:
    """Whether what a record says is of the form that `_record` gives it, and of the folder it lies in."""
    return (
        is_a(made.round, int)
        and (made.round, made.tag) == (_number(made.folder), made.folder.name)
        and all(isinstance(sum, str) and _SUM.fullmatch(sum) for sum in (made.digest, made.weights or made.digest))
        and made.status in ("pending", "pushed")
        and isinstance(made.sent, bool)
        and (made.commit is None or isinstance(made.commit, str) and _COMMIT.fullmatch(made.commit) is not None)
        and (made.commit is not None) == (made.status == "pushed")
    )


def _write_json(path: Path, values: dict[str, Any]) -> None:
    """Replace a file in one step, on disk before this returns."""
    write_text(path, json.dumps(values, indent=1) + "\n", "run recipes/push.py when the run is over")
