"""A run that pushes is killed, or trained by several processes: the Hub holds the same in the end."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import worker_train
from tests.support.hub_pushes import all_answered, wait_for
from tests.support.hub_runs import LORA, RUN, check_rounds, check_same, train
from tests.support.worker_train import ledger

pytest_plugins = ("tests.support.hub_client",)
pytestmark = pytest.mark.slow


def job(folder: Path, name: str, **changes) -> Path:
    """The description of a run in `folder/run`, for tests/support/worker_train.py."""
    described = {"output_dir": str(folder / "run"), "args": RUN, "lora": LORA, "dtype": "float32"}
    path = folder / name
    path.write_text(json.dumps({**described, "result": str(folder / "end"), **changes}))
    return path


def start(path: Path, environment: dict, *launcher: str) -> subprocess.Popen:
    command = [sys.executable, *launcher, worker_train.__file__, str(path)]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def end(process: subprocess.Popen) -> None:
    _, printed = process.communicate(timeout=240)
    assert process.returncode == 0, printed[-3000:]


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
def test_killed_during_a_push_and_resumed(hub, whole, client_environment, tmp_path, lands):
    fault = hub.fault("user/run/commit", stall_s=60)
    process = start(job(tmp_path, "first.json"), client_environment)
    wait_for(lambda: fault.hits == 1 or process.poll() is not None)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    if lands:
        hub.release()
        wait_for(lambda: all_answered(hub))
    end(start(job(tmp_path, "second.json", resume=True), client_environment))
    check_same_end(hub, tmp_path / "run", whole)


@pytest.mark.parametrize(
    "operation",
    ["os.rename hub_outbox/round-0004", "os.rename checkpoint-8"],
    ids=["before the snapshot", "between snapshot and checkpoint"],
)
def test_killed_at_a_rounds_end_and_resumed(hub, whole, client_environment, tmp_path, operation):
    kill = {"watch": [-1, 100], "kill": {"operation": operation}}
    process = start(job(tmp_path, "first.json", **kill), client_environment)
    process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL
    snapshots = sorted(path.name for path in (tmp_path / "run" / "hub_outbox").glob("round-*"))
    assert snapshots == ["round-0002", "round-0004"][: 2 if "checkpoint" in operation else 1]
    end(start(job(tmp_path, "second.json", resume=True), client_environment))
    check_same_end(hub, tmp_path / "run", whole)


def test_two_processes_push_once(hub, users, client_environment, tmp_path):
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    end(start(job(tmp_path, "job.json"), client_environment, *launcher))
    check_rounds(hub, tmp_path / "run")
    created = [request for request in hub.requests if request.path.endswith("repos/create")]
    assert len(created) == 1
