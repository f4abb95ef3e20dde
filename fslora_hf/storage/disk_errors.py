"""What a disk refuses, in one sentence: which file, what was found, and what to do."""

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

START_AGAIN = "start again"
RESUME = "resume with resume_from_checkpoint=True"
_MEND = dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "make room")
_MEND |= dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "let it be written to")
_MEND |= dict.fromkeys((errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ENAMETOOLONG), "name another")
_NATIVE = re.compile(r"\(os error (\d+)\)")  # how writers in Rust (safetensors, tokenizers) end their messages


class WriteError(OSError):
    """Something that a disk did not take, told in one sentence; `errno` and `found` say why."""

    found: str | None = None

    @classmethod
    def of(cls, number: int, what: str | Path, found: str, remedy: str) -> "WriteError":
        mend = _MEND.get(number, "mend the disk")
        error = cls(number, f"Expected to write {what}, found '{found}': {mend}, and {remedy}.")
        error.found = found
        return error

    def __str__(self) -> str:
        return self.strerror


@contextmanager
def told(what: str | Path, remedy: str = START_AGAIN) -> Iterator[None]:
    """Tell in one sentence what a disk refuses inside, where nothing but `what` is written. The outermost call tells.

    Args:
        what: is written: a path, or words that name it.
        remedy: what a user does once the disk is mended, or why that is not needed.

    Raises:
        WriteError: in place of an OSError, or of what native writers raise of their own; all else passes.
    """
    try:
        yield
    except Exception as error:
        number = _number_of(error)
        if number is None:
            raise
        found = getattr(error, "found", None) or getattr(error, "strerror", None) or os.strerror(number)
        raise WriteError.of(number, what, found, remedy) from error


def is_full(error: BaseException | None) -> bool:
    """Whether a full disk is behind an error, however others have wrapped it."""
    while error is not None:
        if isinstance(error, OSError) and _MEND.get(error.errno) == "make room":
            return True
        error = error.__cause__ or error.__context__
    return False


def _number_of(error: Exception) -> int | None:
    """The error number of what a disk refused; None for any other error."""
    if isinstance(error, OSError):
        return error.errno or errno.EIO
    native = _NATIVE.search(str(error))
    return int(native[1]) if native else None
