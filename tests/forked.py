"""Runs of tests/worker_train.py in processes of their own. A test file says `pytest_plugins = ("tests.forked",)`."""

import multiprocessing

import pytest

from tests.worker_train import run


@pytest.fixture(scope="module")
def fork():
    """Runs jobs of tests/worker_train.py in forked processes, several at a time; returns their exit codes."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.warm"])

    def start_and_wait(*jobs: dict) -> list[int]:
        processes = [context.Process(target=run, args=(job,)) for job in jobs]
        for process in processes:
            process.start()
        for process in processes:
            process.join(120)
        return [process.exitcode for process in processes]

    return start_and_wait
