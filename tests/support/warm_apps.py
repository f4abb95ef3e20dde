"""A federation's machine whose nodes and ServerApps are forked from a server that has all imports done.

For a ServerApp, the SuperExec finds in its PATH, in place of Flower's command, a stand-in that asks here for a fork
and lasts as long as it: a kill of the one is a kill of the other.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from multiprocessing import connection
from pathlib import Path

import local  # recipes/federation/local.py

from tests.support.forked import Started, be

COMMAND = "flwr-serverapp"
STAND_IN = """#!{python} -IS
import json, os, socket, sys
link = socket.socket(socket.AF_UNIX)
link.connect({address!r})
link.sendall(json.dumps([sys.argv[1:], os.getcwd(), dict(os.environ)]).encode() + b"\\n")
sys.exit(int(link.makefile().readline() or 1))
"""


@contextlib.contextmanager
def warm_machine(server, folder: Path) -> Iterator[local.Machine]:
    """A machine that forks what is a Python script of ours or a ServerApp; Flower's other processes it starts."""
    with local.machine(folder) as machine, WarmApps(server, folder, folder / "superlink.log") as first:
        machine.environment["PATH"] = f"{first}{os.pathsep}{machine.environment['PATH']}"
        start = machine.start

        def start_or_fork(name: str, command: list[str]) -> subprocess.Popen | Started:
            if command[0] != sys.executable:
                return start(name, command)
            process = Started(server, folder / f"{name}.log", machine.environment, be, command[1:], os.getcwd())
            machine.processes[name] = process
            return process

        machine.start = start_or_fork
        yield machine


class WarmApps:
    """Answers the stand-ins; a context.

    Args:
        folder: for the stand-in, and for the socket.
        log: where the apps' output goes.
    """

    def __init__(self, server, folder: Path, log: Path):
        self._server, self._folder, self._log = server, folder, log
        self._listener = socket.socket(socket.AF_UNIX)

    def __enter__(self) -> Path:
        """The folder to be the first of the SuperExec's PATH."""
        address, stand_in = self._folder / "apps", self._folder / "bin" / COMMAND
        self._listener.bind(str(address))
        self._listener.listen()
        stand_in.parent.mkdir()
        stand_in.write_text(STAND_IN.format(python=sys.executable, address=str(address)))
        stand_in.chmod(0o755)
        threading.Thread(target=self._accept, daemon=True).start()
        return stand_in.parent

    def __exit__(self, *reason) -> None:
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                link, _ = self._listener.accept()
                threading.Thread(target=self._answer, args=(link,), daemon=True).start()

    def _answer(self, link: socket.socket) -> None:
        with link:
            words, cwd, environment = json.loads(link.makefile().readline())
            command = [str(Path(sys.executable).parent / COMMAND), *words]
            process = Started(self._server, self._log, environment, be, command, cwd)
            connection.wait([process.sentinel, link])  # the stand-in says nothing more: it has ended
            if process.poll() is None:
                os.kill(process.pid, signal.SIGKILL)
            with contextlib.suppress(OSError):
                link.sendall(b"%d\n" % process.wait())
