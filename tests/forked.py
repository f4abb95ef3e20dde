"""Runs of tests/worker_train.py in processes of their own. A test file says `pytest_plugins = ("tests.forked",)`."""

import multiprocessing
import socket
import time
from multiprocessing import connection

import pytest

from tests.worker_train import run, run_as

LONGEST = 120  # seconds


@pytest.fixture(scope="module")
def server():
    """A server whose children find everything imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.warm"])
    return context


@pytest.fixture(scope="module")
def fork(server):
    """Runs jobs of tests/worker_train.py in forked processes, several at a time; returns their exit codes."""

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
    ended. Returns their exit codes. (tests/test_laws_processes.py and CI's real run have torchrun itself.)"""

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


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
