"""Between the process that holds a node's model and those that pass packets on to it, on one machine.

A socket in a folder that only its owner can enter; a packet and its answer are each a length and so many bytes. Knows
nothing but the standard library, so that a process that passes one packet on starts in a moment.
"""

import contextlib
import ctypes
import logging
import os
import signal
import socket
import struct
import sys
from collections.abc import Callable
from pathlib import Path

logger = logging.getLogger(__name__)

_LENGTH = struct.Struct("<Q")


class LinkError(ConnectionError):
    """The process that holds the model cannot be reached."""


def end_with_parent() -> None:
    """Have the kernel end this process when the one that started it ends, however that comes about (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def ask(path: str, packet: bytes) -> bytes:
    """The answer to a packet of the process that serves `path`.

    Raises:
        LinkError: there is none, or it ended before it answered.
    """
    try:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(path)
            _send(connection, packet)
            return _receive(connection)
    except (OSError, EOFError) as error:
        raise LinkError(f"Expected the node's process behind {path}, found '{error}': it has ended; start the node "
                        "anew.") from error  # fmt: skip


def serve(path: str, answer: Callable[[bytes], bytes], alive: Callable[[], None] = lambda: None) -> None:
    """Answer packets one after the other, for ever.

    Args:
        alive: called once a second between packets; ends this by raising.

    Raises:
        LinkError: the folder of `path` is open to others.
    """
    folder = Path(path).parent
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    if folder.stat().st_mode & 0o077 or folder.stat().st_uid != os.getuid():
        raise LinkError(f"Expected {folder} to be its owner's alone, found it open to others: chmod 700 {folder}.")
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        listener.settimeout(1.0)
        while True:
            alive()
            try:
                connection, _ = listener.accept()
            except TimeoutError:
                continue
            with connection:
                connection.settimeout(None)
                try:
                    _send(connection, answer(_receive(connection)))
                except (OSError, EOFError):
                    logger.warning("A packet's sender has left before its answer.")


def _send(connection: socket.socket, packet: bytes) -> None:
    connection.sendall(_LENGTH.pack(len(packet)))
    if packet:  # of nothing, the other side has all that there is, and may be gone
        connection.sendall(packet)


def _receive(connection: socket.socket) -> bytes:
    (length,) = _LENGTH.unpack(_exactly(connection, _LENGTH.size))
    return _exactly(connection, length)


def _exactly(connection: socket.socket, size: int) -> bytes:
    parts, left = [], size
    while left:
        part = connection.recv(min(left, 1 << 20))
        if not part:
            raise EOFError("the connection was closed")
        parts.append(part)
        left -= len(part)
    return b"".join(parts)
