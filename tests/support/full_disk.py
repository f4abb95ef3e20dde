"""A disk that is full from some operation on: every later one that needs room below a folder fails, as it would."""

import builtins
import errno
import io
import os
import shutil
from pathlib import Path

import safetensors.torch

from tests.support.disk_operations import WrappedFile


class FullDisk:
    """A context in which the operations below `root` that take room are counted, and fail from number `at` on.

    An operation is the making of a file or folder, a rename, a link, a sync, and every write to a file that Python has
    opened; what safetensors writes is one.
    """

    def __init__(self, root: str | Path, at: int | None = None):
        self.root, self.at, self.count = os.path.abspath(root), at, 0

    def take(self, path) -> None:
        if isinstance(path, int):
            path = os.readlink(f"/proc/self/fd/{path}")
        if isinstance(path, (str, os.PathLike)) and os.path.abspath(path).startswith(self.root):
            self.count += 1
            if self.at is not None and self.count >= self.at:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), os.fspath(path))

    def __enter__(self) -> "FullDisk":
        self._kept = []
        for module, name in ((builtins, "open"), (io, "open")):
            self._put(module, name, self._opening(getattr(module, name)))
        for name, place in (("replace", 1), ("rename", 1), ("mkdir", 0), ("link", 1), ("fsync", 0)):
            self._put(os, name, self._counted(getattr(os, name), place))
        self._put(os, "open", self._opened(os.open))
        self._put(safetensors.torch, "serialize_file", self._counted(safetensors.torch.serialize_file, 1))
        self._put(shutil, "_USE_CP_SENDFILE", False)  # copies by writes
        return self

    def __exit__(self, *reason) -> None:
        for module, name, value in reversed(self._kept):
            setattr(module, name, value)

    def _put(self, module, name: str, value) -> None:
        self._kept.append((module, name, getattr(module, name)))
        setattr(module, name, value)

    def _counted(self, function, place: int):
        def watched(*args, **kwargs):
            self.take(args[place])
            return function(*args, **kwargs)

        return watched

    def _opened(self, function):
        def watched(path, flags, *args, **kwargs):
            if flags & os.O_CREAT:
                self.take(path)
            return function(path, flags, *args, **kwargs)

        return watched

    def _opening(self, function):
        def watched(path, mode="r", *args, **kwargs):
            if not {*mode} & {*"wax+"}:
                return function(path, mode, *args, **kwargs)
            if not isinstance(path, int):  # which has its room already
                self.take(path)
            file = function(path, mode, *args, **kwargs)
            return Filling(file, lambda: self.take(path)) if file.fileno() > 2 else file

        return watched


class Filling(WrappedFile):
    """A file whose writes take room."""

    def __init__(self, file, take):
        super().__init__(file)
        self._take = take

    def write(self, content):
        self._take()
        return self._file.write(content)

    def writelines(self, lines):
        for line in lines:
            self.write(line)
