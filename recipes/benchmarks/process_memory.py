"""Memory of this process, by Linux's /proc.

`VmHWM` is the peak of the program that runs now. `ru_maxrss`, which others read, is handed down from the process that
started it.
"""

from pathlib import Path


def memory(field: str) -> int:
    """Bytes of this process, by a field of /proc/self/status: `VmRSS` (now) or `VmHWM` (the peak)."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.split(f"{field}:")[1].split()[0]) * 1024


def forget_peak() -> None:
    """Start the peak anew from what is held now."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
