"""Folders for runs that nobody has named: no run is lost to the next."""

import errno
import os
import tempfile
from pathlib import Path

from .disk_errors import told


def unused_folder(folder: str) -> str:
    """The folder, or with a number behind it if something is in it already."""
    candidate, number = Path(folder), 1
    while candidate.exists() and not (candidate.is_dir() and not any(candidate.iterdir())):
        number += 1
        candidate = Path(f"{folder}-{number}")
    return str(candidate)


def check_writable(folder: str | Path) -> None:
    """See that a folder can be made and written to, before hours of work end in it; nothing is left behind.

    Raises:
        WriteError: it cannot.
    """
    with told(folder):
        path = Path(os.path.abspath(folder))
        nearest = next(each for each in (path, *path.parents) if os.path.lexists(each))
        if not nearest.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        os.rmdir(tempfile.mkdtemp(prefix=".writable-", dir=nearest))
