"""A run that pushes is killed, or trained by several processes: the Hub holds the same in the end."""

import os
import signal
from pathlib import Path

import pytest

from tests.support.forked import free_port
from tests.support.hub_pushes import all_answered, wait_for
from tests.support.hub_runs import LORA, RUN, check_rounds, check_same, train
from tests.support.worker_train import ledger, run, run_as

pytest_plugins = ("tests.support.hub_client",)
pytestmark = pytest.mark.slow


def job(folder: Path, **changes) -> dict:
    """The description of a run in `folder/run`, for tests/support/worker_train.py."""
    described = {"output_dir": str(folder / "run"), "args": RUN, "lora": LORA, "dtype": "float32"}
    return {**described, "result": str(folder / "end"), **changes}


def check_whole(process) -> None:
    said = process.wait()
    assert process.returncode == 0, said[-3000:]


@pytest.fixture
def whole(hub, users, on_client, tmp_path) -> Path:
    """The same run, uninterrupted."""
    on_client(train, str(tmp_path / "whole"), hub_model_id="user/whole")
    return tmp_path / "whole"


def check_same_end(hub, folder: Path, whole: Path) -> None:
    check_rounds(hub, folder)
    check_same(
        folder / "checkpoint-12" / "adapter_model.safetensors", whole / "checkpoint-12" / "adapter_model.safetensors"
    )
    assert [{**line, "seconds": 0} for line in ledger(folder)] == [{**line, "seconds": 0} for line in ledger(whole)]


@pytest.mark.parametrize("lands", [False, True], ids=["not-landed", "landed"])
def test_killed_during_a_push_and_resumed(hub, whole, fork_client, tmp_path, lands):
    fault = hub.fault("user/run/commit", stall_s=60)
    process = fork_client(run, job(tmp_path))
    wait_for(lambda: fault.hits == 1 or process.poll() is not None)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    if lands:
        hub.release()
        wait_for(lambda: all_answered(hub))
    check_whole(fork_client(run, job(tmp_path, resume=True)))
    check_same_end(hub, tmp_path / "run", whole)


@pytest.mark.parametrize(
    "operation",
    ["os.rename hub_outbox/round-0004", "os.rename checkpoint-8"],
    ids=["before the snapshot", "between snapshot and checkpoint"],
)
def test_killed_at_a_rounds_end_and_resumed(hub, whole, fork_client, tmp_path, operation):
    kill = {"watch": [-1, 100], "kill": {"operation": operation}}
    process = fork_client(run, job(tmp_path, **kill))
    process.wait()
    assert process.returncode == -signal.SIGKILL
    snapshots = sorted(path.name for path in (tmp_path / "run" / "hub_outbox").glob("round-*"))
    assert snapshots == ["round-0002", "round-0004"][: 2 if "checkpoint" in operation else 1]
    check_whole(fork_client(run, job(tmp_path, resume=True)))
    check_same_end(hub, tmp_path / "run", whole)


def test_two_processes_push_once(hub, users, fork_client, tmp_path):
    port = free_port()
    for process in [fork_client(run_as, job(tmp_path), rank, 2, port) for rank in range(2)]:
        check_whole(process)
    check_rounds(hub, tmp_path / "run")
    created = [request for request in hub.requests if request.path.endswith("repos/create")]
    assert len(created) == 1
