"""Locks: one launch at a time in a run's folder, and the lock on an open file that this rests on.

A run's folder is held by a lock of the operating system (flock) on a file in it, which ends with the process that has
it, however that ends. The file says who holds the folder and since when, and its time of change moves every few
seconds as a sign of life. It is gone when the folder is given back.

Guaranteed: of all processes on one machine, containers on it included, one launch holds a folder; likewise on several
machines whose shared disk carries flock from one to the others (NFS on Linux by default, GPFS, CephFS, Lustre mounted
with `flock`). What a killed launch leaves is taken over at once.

Not guaranteed, where the disk keeps flock to each machine (NFS with `local_lock`, Lustre with `localflock`) or has
none (Lustre otherwise, Windows): there a holder is known by its sign of life alone, for which whoever comes waits some
seconds. Two that come within these seconds may miss each other, and a holder that was halted or cut off from the disk
for longer is taken for dead.
"""

import errno
import json
import logging
import os
import platform
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..common.foreign_text import foreign_text
from ..common.processes import agree
from .disk_errors import WriteError, is_full

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

logger = logging.getLogger(__name__)

LOCK_NAME = ".run.lock"
BEAT_SECONDS = 3.0  # between two signs of life
_SILENT_BEATS = 5  # without one, and a holder that no lock speaks for is dead
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP)


class FolderInUse(ValueError):
    """A folder that another launch is at work in."""


def lock_file(descriptor: int, wait: bool = False) -> bool | None:
    """Lock an open file for this process and all that inherit it, with `wait` once nobody else has it locked.

    Returns:
        True; False if another holds it; None where there are no locks to be had.
    """
    if fcntl is None:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return None
    return True


@contextmanager
def held(folder: str | Path) -> Iterator[None]:
    """No other launch writes into a run's folder, which is made if need be, before this is left.

    The first process of the launch takes it and all agree on the outcome. Who holds it already holds it once more.

    Raises:
        FolderInUse: another launch is at work there; nothing in the folder was changed.
        WriteError: there can be no such folder, or nothing can be written to it.
    """
    taken = agree(lambda: _take(Path(folder)))
    try:
        yield
    finally:
        _give_back(taken)  # nothing, in other processes than the first


@dataclass
class _Lock:
    """A folder that this process holds: its lock file, open, what folders were made for it, how often it was taken."""

    path: Path
    descriptor: int
    made: list[Path]
    times: int = 1
    given_back: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self):
        self._pulse = threading.Thread(target=self._live, name="folder-lock", daemon=True)
        self._pulse.start()

    def _live(self) -> None:
        while not self.given_back.wait(BEAT_SECONDS):
            with suppress(OSError):  # a disk that is away for a while
                os.utime(self.path)

    def give_back(self) -> None:
        self.given_back.set()
        self._pulse.join()
        with suppress(OSError):
            if is_at(self.path, self.descriptor):
                os.ftruncate(self.descriptor, 0)
                os.unlink(self.path)  # while it is locked: who has opened it meanwhile sees that it is no longer there
        os.close(self.descriptor)
        _remove_empty(self.made)


_HELD: dict[Path, _Lock] = {}


def _forget() -> None:
    """A forked process holds nothing; closing what it has inherited leaves its parent's locks as they are."""
    for lock in _HELD.values():
        with suppress(OSError):
            os.close(lock.descriptor)
    _HELD.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


def _take(folder: Path) -> Path:
    """Take a folder, once more if it is held; returns where it lies, wherever the process works later."""
    made: list[Path] = []
    try:
        folder = folder.resolve()
        if folder in _HELD:
            _HELD[folder].times += 1
            return folder
        made = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        _HELD[folder] = _Lock(folder / LOCK_NAME, _acquire(folder), made)
        return folder
    except FolderInUse:
        raise
    except (OSError, ValueError) as error:  # the latter for names that no file can have
        _remove_empty(made)
        number, what = getattr(error, "errno", None), getattr(error, "strerror", None) or error
        raise WriteError(
            number or errno.EINVAL,
            f"Expected output_dir to be a folder that can be written to, found '{what}' at {foreign_text(folder)}: "
            f"{'make room there, or name another' if is_full(error) else 'name another, or mend its permissions'}.",
        ) from error


def _give_back(folder: Path) -> None:
    lock = _HELD.get(folder)
    if lock is not None:
        lock.times -= 1
        if not lock.times:
            _HELD.pop(folder).give_back()


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()


def _acquire(folder: Path) -> int:
    """The folder's lock file, open, locked as far as the disk has locks, and with this process's note in it."""
    path = folder / LOCK_NAME
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            locked = lock_file(descriptor)
            note = _read(descriptor)
            if locked is False:
                raise _in_use(folder, note)
            if note and _lives(path, locked, note):
                raise _in_use(folder, note)
            if is_at(path, descriptor):  # else its holder has given it back just now
                if note:
                    logger.warning("Taking %s over from %s, which is gone.", foreign_text(folder), _told(note))
                _write(folder, descriptor, locked)
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _in_use(folder: Path, note: dict[str, Any]) -> FolderInUse:
    return FolderInUse(
        f"Expected no other run at work in {foreign_text(folder)}, found {_told(note)}: wait until it has ended, end "
        "it, or choose another output_dir."
    )


def _lives(path: Path, locked: bool | None, note: dict[str, Any]) -> bool:
    """Whether a holder that does not keep this process from locking its file gives a sign of life.

    A lock that is free says of a holder on this machine that it is dead; of one elsewhere, nothing that is sure.
    """
    if locked and note.get("machine") == _machine():
        return False
    before = _stamp(path)
    for _ in range(_SILENT_BEATS):
        time.sleep(BEAT_SECONDS)
        if _stamp(path) != before:
            return _stamp(path) is not None
    return False


def _stamp(path: Path) -> int | None:
    """When a file was last changed, None if it is gone. Opened anew, as disks on a network answer from memory else."""
    try:
        with open(path, "rb") as file:
            return os.fstat(file.fileno()).st_mtime_ns
    except FileNotFoundError:
        return None


def _write(folder: Path, descriptor: int, locked: bool | None) -> None:
    """Note who holds the folder; where nothing is locked, the last to do so in one beat holds it."""
    note = {"host": platform.node(), "process": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
    note |= {"machine": _machine(), "id": uuid.uuid4().hex}
    os.ftruncate(descriptor, 0)
    os.lseek(descriptor, 0, os.SEEK_SET)
    os.write(descriptor, json.dumps(note).encode())
    if not locked:
        time.sleep(BEAT_SECONDS)
        last = _read(descriptor)
        if last.get("id") != note["id"]:
            raise _in_use(folder, last)


def _read(descriptor: int) -> dict[str, Any]:
    """The note in a lock file: nothing in an empty one, and nothing to be told of one that a kill cut short."""
    os.lseek(descriptor, 0, os.SEEK_SET)
    content = os.read(descriptor, 4096)
    try:
        note = json.loads(content) if content else {}
    except ValueError:
        note = None
    return note if isinstance(note, dict) else {"process": "?"}


def _told(note: dict[str, Any]) -> str:
    if "host" not in note:
        return "another process"
    number, host, since = (foreign_text(note.get(name, "?"), 60) for name in ("process", "host", "since"))
    return f"process {number} on {host}, there since {since}"


def is_at(path: Path, descriptor: int) -> bool:
    """Whether an open file is the one that a path leads to."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


@lru_cache(maxsize=1)
def _machine() -> str:
    """Tells the machine, as it runs since it was started, from all others; the same in all containers on it."""
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return f"{platform.node()} {uuid.getnode():x}"
