"""What an earlier version wrote is taken up by this one and ends where that version ended.

tests/recorded/record.py says how it was made. Equal is up to the rounding of float64, which may differ between kinds
of processors and ways to add up.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fslora_hf.hub.outbox import OUTBOX_NAME, Outbox
from fslora_hf.hub.pusher import push_pending
from fslora_hf.hub.remote import HubTarget
from tests.support import recorded
from tests.support.hub_calls import WRITES
from tests.support.worker_train import check_same_ledger, ledger

pytest_plugins = ("tests.support.hub_client",)

EXACT = 1e-11  # in another order of adding, some 1e-15


@pytest.fixture
def left(tmp_path):
    """A copy of what a run left behind when it was killed."""

    def copy(name: str) -> Path:
        return shutil.copytree(recorded.RECORDED / name / "run", tmp_path / "run")

    return copy


def train(name: str, folder: str, resume: str | bool) -> None:
    """Take a run up; for the runs that push, in the client's process."""
    recorded.build(name, folder).train(resume_from_checkpoint=resume)


def tensors_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint; files of what clients left out without the hash of their bits in their names."""
    found = {}
    for path in checkpoint.rglob("*.safetensors"):
        file = path.relative_to(checkpoint).with_name(path.name.split("-")[0])
        found |= {f"{file}: {name}": tensor for name, tensor in load_file(path).items()}
    return found


def check_same_end(name: str, folder: Path) -> None:
    """The last checkpoint and the ledger are those of the run that was never interrupted."""
    expected = recorded.RECORDED / name / "expected"
    last = folder / f"checkpoint-{recorded.ROUNDS * recorded.STEPS}"
    assert json.loads((last / "federated_state.json").read_text())["round"] == recorded.ROUNDS
    found, wanted = tensors_of(last), tensors_of(expected)
    assert found.keys() == wanted.keys()
    for key, tensor in wanted.items():
        torch.testing.assert_close(found[key], tensor, rtol=0, atol=EXACT, msg=lambda text, key=key: f"{key}: {text}")
    check_same_ledger(folder, expected)


@pytest.mark.parametrize("name", ["sketches", "folded"])
def test_a_checkpoint_is_resumed(left, name):
    """From its second round; the ledger beside it has a third, which is done again."""
    folder = left(name)
    assert len(ledger(folder)) == 3
    train(name, str(folder), True)
    check_same_end(name, folder)


def test_what_is_recorded_matters_to_the_end(left):
    """The two rounds that are left move every tensor of the checkpoint: a resumed run that did nothing would show."""
    before = tensors_of(left("sketches") / f"checkpoint-{2 * recorded.STEPS}")
    wanted = tensors_of(recorded.RECORDED / "sketches" / "expected")
    kept = {key for key in wanted.keys() & before.keys() if not key.startswith("error_feedback")}
    assert len(kept) > 40 and all((wanted[key] - before[key]).abs().max() > 100 * EXACT for key in kept)


def restore(hub) -> None:
    """The repository as the earlier version left it on the Hub."""
    hub.create(recorded.REPOSITORY).git("fetch", str(recorded.RECORDED / "pushed" / "hub.bundle"), "refs/*:refs/*")


def send(folder: str) -> list[int]:
    """In the client's process: what `recipes/push.py` does; the rounds that are still missing."""
    return push_pending(HubTarget(recorded.REPOSITORY, WRITES), Outbox(Path(folder) / OUTBOX_NAME)).missing


def check_hub(hub, rounds: int, before: dict[str, str]) -> None:
    """Every round is on the Hub under its tag; those that were there stay the commits they were."""
    refs = hub.find(recorded.REPOSITORY).refs()
    assert sorted(refs) == ["refs/heads/main", *(f"refs/tags/round-{n + 1:04d}" for n in range(rounds))]
    kept = {ref: commit for ref, commit in before.items() if "tags" in ref}
    assert kept.items() <= refs.items() and len(kept) == 2
    assert refs["refs/heads/main"] == refs[f"refs/tags/round-{rounds:04d}"]


@pytest.mark.slow
def test_an_outbox_is_sent(hub, users, on_client, left):
    """Its third round had been on its way when the Hub failed; what is sent is what was kept."""
    folder = left("pushed")
    kept = Outbox(folder / OUTBOX_NAME, tidy=False)
    assert [snapshot.status for snapshot in kept.all()] == ["pushed", "pushed", "pending"] and kept.get(3).sent
    files = {path.as_posix(): (kept.get(3).tree / path).read_bytes() for path in kept.get(3).files}
    restore(hub)
    before = hub.find(recorded.REPOSITORY).refs()
    assert on_client(send, str(folder)) == []
    check_hub(hub, 3, before)
    assert files.items() <= hub.find(recorded.REPOSITORY).files("round-0003").items()
    assert [snapshot.status for snapshot in kept.all()] == ["pushed"] * 3


@pytest.mark.slow
def test_a_run_that_pushes_is_resumed(hub, users, on_client, left):
    """Its own folder beside what lies on the Hub."""
    folder = left("pushed")
    restore(hub)
    before = hub.find(recorded.REPOSITORY).refs()
    on_client(train, "pushed", str(folder), True)
    check_same_end("pushed", folder)
    check_hub(hub, recorded.ROUNDS, before)


@pytest.mark.slow
def test_a_run_is_resumed_from_its_repository(hub, users, on_client, tmp_path):
    """On an empty disk, from the second round, the last that reached the Hub."""
    restore(hub)
    before = hub.find(recorded.REPOSITORY).refs()
    on_client(train, "pushed", str(tmp_path / "run"), "hub")
    check_same_end("pushed", tmp_path / "run")
    check_hub(hub, recorded.ROUNDS, before)
