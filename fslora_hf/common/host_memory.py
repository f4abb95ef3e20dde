"""The memory of the machine and of this process: what is held and free, and what becomes of it once it is freed.

All of it is Linux's; elsewhere `is_measured()` is false, and the two functions about freed memory do nothing.
"""

import contextlib
import ctypes
import os
from pathlib import Path

_STATUS, _PEAK_RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_CONTROL_GROUPS = (  # where the limit and the use are told, and the part of the use that can be had; versions 2, 1
    ("/sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
    ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)
# glibc's mallopt(3), the number of each parameter and its value: freed memory is kept (M_TRIM_THRESHOLD), but for
# blocks larger than 32 MiB (M_MMAP_THRESHOLD, the most there can be), which no other block would fill.
_KEEP = ((-1, -1), (-3, 2**25))
_SET_BY_USER = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_", "GLIBC_TUNABLES")


def is_measured() -> bool:
    """Whether this system tells what a process holds."""
    return _STATUS.exists()


def held_bytes() -> int:
    """What this process holds now."""
    return _status("VmRSS")


def peak_bytes() -> int:
    """The most that this program has held (`ru_maxrss`, which others read, is handed down by the starting process), or
    has held since `forget_peak`."""
    return _status("VmHWM")


def forget_peak() -> None:
    """Start the peak anew from what is held now, where the kernel lets a process do so."""
    with contextlib.suppress(OSError):  # an earlier peak may count then: too much, never too little
        _PEAK_RESET.write_text("5", encoding="ascii")


def free_bytes() -> int:
    """What can be had without swapping, of the machine and of the control group that holds this process."""
    free = 1024 * _figure(Path("/proc/meminfo"), "MemAvailable:")
    for folder, limit, used, cached in _CONTROL_GROUPS:
        with contextlib.suppress(OSError, ValueError):  # no such file, or no limit ("max")
            taken = int(Path(folder, used).read_text()) - _figure(Path(folder, "memory.stat"), cached)
            free = min(free, int(Path(folder, limit).read_text()) - taken)
    return free


def keep_freed_memory() -> bool:
    """Make glibc keep what this process frees, for its next allocation; returns whether it does.

    By default a tensor that is freed is often returned to the system, so that a training step on a CPU has the kernel
    clear the same gigabytes page by page, at each step again. An allocator that the user has set by the environment is
    left alone.
    """
    if any(name in os.environ for name in _SET_BY_USER):
        return False
    mallopt = _glibc("mallopt")
    return mallopt is not None and all(mallopt(name, value) for name, value in _KEEP)


def return_freed_memory() -> None:
    """Give the system back what is free but kept."""
    trim = _glibc("malloc_trim")
    if trim is not None:
        trim(0)


def _glibc(function: str):
    """A function of the GNU C library, None where the process runs on another."""
    try:
        library = ctypes.CDLL(None)
        library.gnu_get_libc_version  # noqa: B018 - an AttributeError elsewhere
        return getattr(library, function)
    except (AttributeError, OSError, TypeError):
        return None


def _status(name: str) -> int:
    return 1024 * _figure(_STATUS, f"{name}:")


def _figure(path: Path, name: str) -> int:
    """The number that follows `name` in a file of the kernel's; in /proc these are kilobytes."""
    return int(next(line.split()[1] for line in path.read_text().splitlines() if line.split()[0] == name))
