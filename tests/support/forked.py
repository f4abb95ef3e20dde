"""Runs of tests/support/worker_train.py, and of scripts, in processes of their own.

A test file says `pytest_plugins = ("tests.support.forked",)`.
"""

import gc
import multiprocessing
import os
import runpy
import socket
import sys
import time
from multiprocessing import connection
from pathlib import Path

import pytest
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import prepare_simple_launcher_cmd_env

from tests.support.worker_train import run, run_as

ROOT = Path(__file__).resolve().parents[2]
LONGEST = 120  # seconds


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
    """Runs one job in several processes that know each other, as torchrun does: once one has failed, the others are
    ended. Returns their exit codes. (tests/laws/test_laws_processes.py and CI's real run have torchrun itself.)"""

    def start_and_wait(job: dict, processes: int = 2) -> list[int]:
        port = free_port()
        ranks = [server.Process(target=run_as, args=(job, rank, processes, port)) for rank in range(processes)]
        for process in ranks:
            process.start()
        end, left = time.monotonic() + LONGEST, list(ranks)
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

    return start_and_wait


@pytest.fixture(scope="module")
def run_script(server, tmp_path_factory):
    """Runs a script of recipes/ with its arguments in a forked process, in the environment that `accelerate launch`
    with the CPU's configuration would give it, which saves two starts of an interpreter; returns what it printed.
    (tests/recipes/test_recipes.py has `accelerate launch` itself.)"""

    def start_and_wait(script: str, *arguments: str, cwd: Path = ROOT) -> str:
        folder = tmp_path_factory.mktemp("script")
        process = server.Process(target=run_file, args=([script, *arguments], str(cwd), str(folder)))
        process.start()
        process.join(500)
        assert process.exitcode == 0, (folder / "stderr").read_text()[-3000:]
        return (folder / "stdout").read_text()

    return start_and_wait


def launched_environment() -> dict[str, str]:
    """What `accelerate launch --config_file recipes/accelerate_configs/cpu.yaml` sets."""
    parser = launch_command_parser()
    arguments = parser.parse_args(["--config_file", str(ROOT / "recipes/accelerate_configs/cpu.yaml"), "script.py"])
    arguments, *_ = _validate_launch_command(arguments)
    return prepare_simple_launcher_cmd_env(arguments)[1]


def run_file(command: list[str], cwd: str, folder: str) -> None:
    """Run a script as `python script ...` would, its output into files of a folder."""
    os.environ.update(launched_environment())
    os.chdir(cwd)
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(f"{folder}/{name}", os.O_CREAT | os.O_WRONLY), number)
    script = Path(command[0]).resolve()
    sys.argv, sys.path[0] = [str(script), *command[1:]], str(script.parent)
    runpy.run_path(str(script), run_name="__main__")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
