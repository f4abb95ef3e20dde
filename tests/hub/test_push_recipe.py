"""recipes/push.py sends what is missing, once, and says by its exit code whether all is there."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fslora_hf.hub.outbox import Outbox
from recipes.push import find_outbox, find_target
from tests.support.hub_calls import WRITES

pytest_plugins = ("tests.support.hub_client",)
ROOT = Path(__file__).parents[2]


@pytest.fixture
def run_dir(tmp_path) -> Path:
    """The output_dir of a run that has two rounds to push."""
    outbox = Outbox(tmp_path / "run" / "hub_outbox")
    outbox.write_target("user/run", "main", True)
    for number in (5, 10):
        outbox.add(number, lambda folder, n=number: (folder / "adapter_model.safetensors").write_bytes(b"%d" % n))
    return tmp_path / "run"


@pytest.fixture
def push(users, client_environment):
    """`push(*arguments, **environment)` runs the script; returns its exit code and all that it printed."""

    def call(*arguments, **environment):
        command = [sys.executable, str(ROOT / "recipes" / "push.py"), *map(str, arguments)]
        done = subprocess.run(
            command, env=client_environment | environment, capture_output=True, text=True, timeout=120
        )
        return done.returncode, done.stdout + done.stderr

    return call


def refs(hub, repo_id="user/run") -> dict[str, str]:
    return hub.find(repo_id).refs() if hub.find(repo_id) else {}


def test_what_is_missing_is_sent_once(hub, push, run_dir):
    code, printed = push(run_dir, "--token", WRITES)
    assert code == 0, printed
    assert [line.split()[-1] for line in printed.splitlines()[-2:]] == ["yes", "yes"]
    assert WRITES not in printed
    made = refs(hub)
    assert set(made) == {"refs/heads/main", "refs/tags/round-0005", "refs/tags/round-0010"}
    assert hub.find("user/run").private and hub.find("user/run").files()["adapter_model.safetensors"] == b"10"
    hub.requests.clear()
    assert push(run_dir, "--token", WRITES) == (0, printed)
    assert refs(hub) == made and hub.requests == []


def test_a_failure_is_told_by_the_table_and_the_exit_code_and_the_rest_sent_later(hub, push, run_dir):
    hub.fault("commit", status=413, after=1)
    code, printed = push(run_dir, HF_TOKEN=WRITES)
    first, second = printed.splitlines()[-2:]
    assert code == 1 and first.endswith("yes") and "Expected room for the round in user/run" in second
    assert "refs/tags/round-0010" not in refs(hub)
    assert push(run_dir, HF_TOKEN=WRITES)[0] == 0
    assert "refs/tags/round-0010" in refs(hub)


def test_a_push_beside_a_run_leaves_what_the_run_is_writing(push, run_dir):
    partial = run_dir / "hub_outbox" / ".round-0015.partial"
    partial.mkdir()
    assert push(run_dir, "--token", WRITES)[0] == 0
    assert partial.exists()


def test_another_repository_may_be_named(hub, push, run_dir):
    assert push(run_dir, "--token", WRITES, "--repo_id", "user/other")[0] == 0
    assert refs(hub) == {} and len(refs(hub, "user/other")) == 3


def test_a_folder_without_an_outbox_or_a_target_is_told(run_dir, tmp_path):
    with pytest.raises(
        ValueError, match="^Expected the output_dir of a run that pushes rounds, found no hub_outbox in "
    ):
        find_outbox(str(tmp_path))
    os.remove(run_dir / "hub_outbox" / "target.json")
    with pytest.raises(ValueError, match="^Expected the repository that the rounds go to in .*, found none: name "):
        find_target(find_outbox(str(run_dir)), None, None)


def test_the_script_itself_ends_with_one_sentence(push, tmp_path):
    code, printed = push(tmp_path)
    assert code == 1 and printed.startswith("Expected the output_dir of a run") and printed.count("\n") == 1
    assert not (tmp_path / "hub_outbox").exists()
