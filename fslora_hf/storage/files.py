"""Files written in one step: whole and on the disk before anything sees them, and one sentence where that fails."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from .disk_errors import START_AGAIN, told
from .locks import is_at, lock_file


@contextmanager
def whole_file(path: str | Path, remedy: str = START_AGAIN, *, sync: bool = True) -> Iterator[BinaryIO]:
    """Yield a file to write bytes to; on leaving, they stand at `path`.

    An error inside leaves `path` as it was and nothing beside it; a kill leaves `.<name>.partial`, which the next
    call takes up. Of several processes that write one path, each writes a whole file, and the last one's stays.

    Args:
        sync: have it on the disk before this returns; without, a power failure may take it back.

    Raises:
        WriteError: the disk failed or is full.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial")
    with told(path, remedy), _claimed(partial) as file:
        try:
            file.truncate(0)  # what a kill left
            yield file
            file.flush()
            if sync:
                os.fsync(file.fileno())
            if os.name == "nt":
                file.close()  # Windows renames no open file
            os.replace(partial, path)
        except BaseException:
            with suppress(OSError):
                partial.unlink()
            raise
        if sync:
            sync_path(path.parent)


def write_text(path: str | Path, text: str, remedy: str = START_AGAIN) -> None:
    """Write a text file in one step, on the disk before this returns; errors as of `whole_file`."""
    with whole_file(path, remedy) as file:
        file.write(text.encode("utf-8"))


def append_line(path: str | Path, line: str, remedy: str = START_AGAIN) -> None:
    """Add a line to a file, on the disk before this returns; an error leaves the file as it was.

    Raises:
        WriteError: the disk failed or is full.
    """
    # Without a buffer, which would be written once more on closing, behind what is cut off here.
    with told(path, remedy), open(path, "ab", buffering=0) as file:
        before, rest = file.tell(), line.encode("utf-8") + b"\n"
        try:
            while rest:
                rest = rest[file.write(rest) :]
            os.fsync(file.fileno())
        except BaseException:
            with suppress(OSError):
                os.truncate(path, before)
            raise


def make_folder(path: str | Path, remedy: str = START_AGAIN) -> Path:
    """A folder that is there or made, with those above it.

    Raises:
        WriteError: it cannot be made.
    """
    with told(path, remedy):
        Path(path).mkdir(parents=True, exist_ok=True)
    return Path(path)


@contextmanager
def whole_files(folder: str | Path, remedy: str = START_AGAIN, updates: tuple[str, ...] = ()) -> Iterator[Path]:
    """Yield an empty folder to write files into; on leaving, each moves to `folder`, over one of its name.

    An error inside leaves `folder` as it was, and so does a kill, but for `.files.partial`, which the next call takes
    up.

    Args:
        updates: names of files whose present content the writer looks at: they are there to begin with.

    Raises:
        WriteError: the disk failed or is full.
    """
    folder = Path(folder)
    partial = folder / ".files.partial"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with told(f"files into {folder}", remedy):
            partial.mkdir(parents=True)
            for name in updates:
                if (folder / name).is_file():
                    shutil.copyfile(folder / name, partial / name)
            yield partial
            sync_tree(partial)
            for path in sorted(partial.rglob("*")):
                if path.is_file():
                    target = folder / path.relative_to(partial)
                    target.parent.mkdir(exist_ok=True)
                    os.replace(path, target)
            sync_path(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def sync_path(path: Path) -> None:
    """Have a file's content, or a folder's list of names, on disk before this returns."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Have a folder and all below it on disk before this returns."""
    for path in [*folder.rglob("*"), folder]:
        sync_path(path)


@contextmanager
def _claimed(partial: Path) -> Iterator[BinaryIO]:
    """The file at `partial`, which no other process or thread writes to or renames meanwhile."""
    while True:
        descriptor = os.open(partial, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666)
        with open(descriptor, "wb") as file:
            if lock_file(descriptor, wait=True) and not is_at(partial, descriptor):
                continue  # the one who held it has renamed it meanwhile
            yield file
            return
