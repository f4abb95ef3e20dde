"""Runs of tests/support/worker_train.py, and of scripts, in processes of their own.

A test file says `pytest_plugins = ("tests.support.forked",)`.
"""

import ctypes
import gc
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import time
from multiprocessing import connection
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.support.forked_trainings import fork_trainings, launched_environment
from tests.support.worker_train import rank_variables, run, run_as

ROOT = Path(__file__).resolve().parents[2]
CPU = ROOT / "recipes/accelerate_configs/cpu.yaml"
LONGEST = 120  # seconds
M_MMAP_THRESHOLD = -3  # of glibc's malloc.h


@pytest.fixture(scope="session")
def server():
    """A server whose children find everything imported; it is there."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.support.warm"])
    first = context.Process(target=gc.collect)
    first.start()
    first.join()
    return context


@pytest.fixture(scope="module")
def fork(server):
    """Runs jobs of tests/support/worker_train.py in forked processes, several at a time; returns their exit codes."""

    def start_and_wait(*jobs: dict) -> list[int]:
        processes = [server.Process(target=run, args=(job,)) for job in jobs]
        for process in processes:
            process.start()
        for process in processes:
            process.join(LONGEST)
        return [process.exitcode for process in processes]

    return start_and_wait


@pytest.fixture(scope="module")
def fork_ranks(server):
    """Runs one job in several processes that know each other, as torchrun does; returns their exit codes.
    (tests/laws/test_laws_processes.py and CI's real run have torchrun itself.)"""

    def start_and_wait(job: dict, processes: int = 2) -> list[int]:
        port = free_port()
        return wait_for(
            [server.Process(target=run_as, args=(job, rank, processes, port)) for rank in range(processes)]
        )

    return start_and_wait


@pytest.fixture(scope="session")
def run_python(server, tmp_path_factory):
    """Does what `python words...` does, or torchrun with several processes, in forked processes: no interpreter starts
    and nothing is imported again.

    A script that reads its environment when libraries are imported needs a start of its own; the first word is a
    script's path or -m. With `forks`, the trainings that a comparison starts are forked, too. Returns what
    subprocess.run(..., capture_output=True, text=True) would.
    """

    def start_and_wait(
        *words: str,
        cwd: Path | None = None,
        env: dict[str, str] | None = None,
        processes: int = 1,
        forks: bool = False,
    ) -> subprocess.CompletedProcess:
        folder = tmp_path_factory.mktemp("said")
        given = [str(word) for word in words], str(cwd or Path.cwd()), str(folder), forks
        variables = dict(os.environ if env is None else env)
        ranks = [variables]
        if processes > 1:
            port = free_port()
            ranks = [variables | rank_variables(rank, processes, port) for rank in range(processes)]
        codes = wait_for([server.Process(target=run_file, args=(*given, each)) for each in ranks], 500)
        said = [(folder / name).read_text() for name in ("stdout", "stderr")]
        return subprocess.CompletedProcess(words, next(filter(None, codes), 0), *said)

    return start_and_wait


@pytest.fixture
def forked_measurements(run_python, monkeypatch):
    """The benchmarks' measurements, each a process of its own, are forked."""

    def started(command: list[str], *, env: dict[str, str], **pipes) -> subprocess.CompletedProcess:
        return run_python(*command[1:], env=env)

    monkeypatch.setattr("turns.subprocess", SimpleNamespace(run=started, PIPE=subprocess.PIPE))


@pytest.fixture(scope="session")
def run_script(run_python):
    """Runs a script of recipes/ with its arguments in the environment that `accelerate launch` with the CPU's
    configuration would give it; returns what it printed. (tests/recipes/test_recipes.py has `accelerate launch`.)"""

    def start_and_wait(script: str, *arguments: str, cwd: Path = ROOT, forks: bool = False) -> str:
        environment = {**os.environ, **launched_environment(CPU)}
        done = run_python(script, *arguments, cwd=cwd, env=environment, forks=forks)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    return start_and_wait


class Started:
    """A forked process as `subprocess.Popen` would show it; like one started with `start_new_session`.

    Args:
        function: what it calls, with its arguments.
        log: a file that its output is added to.
    """

    def __init__(self, server, log: Path, environment: dict[str, str], function, *arguments):
        self._process = server.Process(target=in_a_session, args=(str(log), environment, function, arguments))
        self._process.start()
        self.pid, self.sentinel = self._process.pid, self._process.sentinel

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(str(self._process), timeout)
        return self._process.exitcode


def in_a_session(log: str, environment: dict[str, str], function, arguments: tuple) -> None:
    os.setsid()
    os.environ.clear()
    os.environ.update(environment)
    for number in (1, 2):
        os.dup2(os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND), number)
    function(*arguments)


def wait_for(ranks: list, longest: float = LONGEST) -> list[int]:
    """Starts processes and waits for them; once one has failed, the others are ended. Returns their exit codes."""
    for process in ranks:
        process.start()
    end, left = time.monotonic() + longest, list(ranks)
    while left and time.monotonic() < end:
        connection.wait([process.sentinel for process in left], timeout=1)
        left = [process for process in left if process.exitcode is None]
        if any(process.exitcode for process in ranks):
            break
    for process in left:
        process.kill()
    for process in ranks:
        process.join()
    return [process.exitcode for process in ranks]


def run_file(words: list[str], cwd: str, folder: str, forks: bool, environment: dict[str, str]) -> None:
    """What `python words...` does, its output into files of a folder."""
    if forks:
        fork_trainings()
    os.environ.clear()
    os.environ.update(environment)
    if threshold := environment.get("MALLOC_MMAP_THRESHOLD_"):  # which glibc looks for when a process starts
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, int(threshold))
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(f"{folder}/{name}", os.O_CREAT | os.O_WRONLY | os.O_APPEND), number)
    be(words, cwd)


def be(words: list[str], cwd: str) -> None:
    """What `python words...` is in a folder."""
    os.chdir(cwd)
    if words[0] == "-m":
        sys.argv, sys.path[0] = words[1:], cwd
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        script = Path(words[0]).resolve()
        sys.argv, sys.path[0] = [str(script), *words[1:]], str(script.parent)
        runpy.run_path(str(script), run_name="__main__")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
