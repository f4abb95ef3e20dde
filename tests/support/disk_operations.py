"""Everything that a process does to the files of a folder, numbered: for kills and photographs at each moment."""

import io
import os
import shutil
import signal
import sys
from pathlib import Path

import safetensors.torch
import torch


class DiskOperations:
    """Numbers everything this process does to the files under `root` while armed.

    Args:
        root: the folder.
        kill_at: number or text of an operation at which the process kills itself, by SIGKILL.
        album: a folder; a copy of `root` as each operation's moment finds it goes to `<album>/<number>`. It is what
            a kill at that moment leaves (tests/laws/test_laws_resume.py compares the two).

    A number stands for the moment before an operation, and for three moments within one: a file exists but is empty;
    half of its first write is there; half of what a native writer (safetensors, torch.save) wrote is there. A kill
    spares what the kernel has been given, so synchronising is no moment of its own.
    """

    def __init__(self, root, kill_at: int | str | None = None, album: str | None = None):
        self.root, self.kill_at, self.album = os.path.abspath(root), kill_at, album
        self.armed, self.log = False, []
        sys.addaudithook(self._audit)
        io.open = sys.modules["builtins"].open = self._opening(io.open)
        safetensors.torch.serialize_file = self._torn(safetensors.torch.serialize_file)
        torch.save = self._torn(torch.save)

    def happens(self, what: str, path, tear: bool = False) -> None:
        place = self._place(path)
        if not self.armed or place is None:
            return
        self.log.append(f"{what} {place}")
        if self.album is not None:
            copy = Path(self.album, str(len(self.log)))
            shutil.copytree(self.root, copy / "run", symlinks=True) if os.path.exists(self.root) else copy.mkdir()
            if tear:
                halve(copy / "run" / place)
        if self.kill_at in (len(self.log), self.log[-1]):
            if tear:
                halve(Path(self.root, place))
            os.kill(os.getpid(), signal.SIGKILL)

    def _place(self, path, folder: int = -1) -> str | None:
        """`path` (or what the descriptor stands for) relative to the root, None if it is elsewhere."""
        if not isinstance(path, (str, bytes, os.PathLike)):
            path = path if isinstance(path, int) else path.fileno()
            path = os.readlink(f"/proc/self/fd/{path}")
        path = os.fsdecode(path)
        if folder >= 0:
            path = os.path.join(os.readlink(f"/proc/self/fd/{folder}"), path)
        path = os.path.abspath(path)
        return os.path.relpath(path, self.root) if (path + os.sep).startswith(self.root + os.sep) else None

    def _audit(self, event: str, args: tuple) -> None:
        if not self.armed:
            return
        if event == "open" and isinstance(args[0], (str, bytes, os.PathLike)):
            if args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                self.happens("open", args[0])
        elif event in ("os.rename", "os.link", "os.symlink"):
            self.happens(event, args[1])
        elif event in ("os.remove", "os.rmdir", "os.mkdir"):
            place = self._place(args[0], args[-1])
            if place is not None and os.path.exists(os.path.join(self.root, place)) == (event != "os.mkdir"):
                self.happens(event, os.path.join(self.root, place))
        elif event == "os.truncate":
            self.happens(event, args[0])

    def _torn(self, write):
        def watched(content, path, *args, **kwargs):
            self.happens("native write", path) if isinstance(path, (str, os.PathLike)) else None
            result = write(content, path, *args, **kwargs)
            self.happens("torn", path, tear=True) if isinstance(path, (str, os.PathLike)) else None
            return result

        return watched

    def _opening(self, function):
        def watched(path, mode="r", *args, **kwargs):
            file = function(path, mode, *args, **kwargs)
            if not self.armed or not set(mode) & set("wax+") or self._place(path) is None:
                return file
            self.happens("opened", path)
            return HalfWriter(file, lambda: self.happens("half written", path))

        return watched


def halve(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


class WrappedFile:
    """A file of which a subclass writes in its own way; all else is the file's."""

    def __init__(self, file):
        self._file = file

    def __getattr__(self, name):
        return getattr(self._file, name)

    def __enter__(self):
        self._file.__enter__()
        return self

    def __exit__(self, *reason):
        return self._file.__exit__(*reason)


class HalfWriter(WrappedFile):
    """A file whose first write comes in two halves, with `between` called between them."""

    def __init__(self, file, between):
        super().__init__(file)
        self._between = between

    def write(self, content) -> int:
        if self._between is not None:
            between, self._between = self._between, None
            self._file.write(content[: len(content) // 2])
            self._file.flush()
            between()
            self._file.write(content[len(content) // 2 :])
            return len(content)
        return self._file.write(content)
