"""What an earlier version wrote is taken up by this one and ends where that version ended.

tests/recorded/record.py says how it was made. Equal is up to the rounding of float64, which may differ between kinds
of processors and ways to add up.
"""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fslora_hf.hub.outbox import OUTBOX_NAME, Outbox
from fslora_hf.hub.pusher import push_pending
from fslora_hf.hub.remote import HubTarget
from recipes import compare, evaluate, leaderboard
from tests.support import federated, recorded
from tests.support.hub_calls import WRITES
from tests.support.worker_train import check_same_ledger, ledger

pytest_plugins = ("tests.support.hub_client",)

EXACT = 1e-11  # in another order of adding, some 1e-15
LAST = f"checkpoint-{recorded.ROUNDS * recorded.STEPS}"


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


def check_same_end(name: str, last: Path, rounds: int = recorded.ROUNDS, bound: float = EXACT) -> None:
    """The last checkpoint and the ledger beside it are those of the run that was never interrupted."""
    expected = recorded.RECORDED / name / "expected"
    assert json.loads((last / "federated_state.json").read_text())["round"] == rounds
    found, wanted = tensors_of(last), tensors_of(expected)
    assert found.keys() == wanted.keys()
    for key, tensor in wanted.items():
        torch.testing.assert_close(found[key], tensor, rtol=0, atol=bound, msg=lambda text, key=key: f"{key}: {text}")
    check_same_ledger(last.parent, expected, rtol=max(bound, 1e-9))


@pytest.mark.parametrize("name", ["sketches", "folded"])
def test_a_checkpoint_is_resumed(left, name):
    """From its second round; the ledger beside it has a third, which is done again."""
    folder = left(name)
    assert len(ledger(folder)) == 3
    train(name, str(folder), True)
    check_same_end(name, folder / LAST)


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
    check_same_end("pushed", folder / LAST)
    check_hub(hub, recorded.ROUNDS, before)


@pytest.mark.slow
def test_a_run_is_resumed_from_its_repository(hub, users, on_client, tmp_path):
    """On an empty disk, from the second round, the last that reached the Hub."""
    restore(hub)
    before = hub.find(recorded.REPOSITORY).refs()
    on_client(train, "pushed", str(tmp_path / "run"), "hub")
    check_same_end("pushed", tmp_path / "run" / LAST)
    check_hub(hub, recorded.ROUNDS, before)


# ---- a federation ----


def test_a_federation_is_resumed(tmp_path, monkeypatch):
    """Its server from the second round, its nodes with what they had left out by then; one had trained on."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(recorded.RECORDED / "federation", "federated")
    Path("source").mkdir()
    federated.write_model_and_rows(Path("source"))
    shutil.copytree(recorded.MODEL, "source/model", dirs_exist_ok=True)
    recipe = federated.write_recipe(Path("source"), Path("federated"), **recorded.FEDERATION)
    exchange = federated.LocalExchange(federated.make_nodes(Path("federated")))
    federated.federate(recipe, exchange, resume=True)
    trained = [packet.header["round"] for _, packet in exchange.sent if packet.kind == "train"]
    assert trained == [2] * 3
    # Its model is a stock Llama, whose norms compute in float32: sums in another order show there.
    check_same_end("federation", Path("federated/run/checkpoint-3"), rounds=3, bound=1e-6)


# ---- results ----


@pytest.fixture
def compared(tmp_path, monkeypatch):
    """The comparison and the evaluations of one of its runs, in the present folder."""
    monkeypatch.chdir(tmp_path)
    for name in ("bytes", "compared", "evaluated"):
        shutil.copytree(recorded.RECORDED / name, name)
    for run in Path("compared/runs").iterdir():
        (run / "rounds.png").touch()  # a finished run has one; it was not kept
    recorded.write_files(Path(), **recorded.COMPARISON)


def script(monkeypatch, main, *args: str) -> None:
    monkeypatch.setattr(sys, "argv", ["script", *args])
    main()


def test_a_comparison_is_taken_up(compared, monkeypatch, capsys):
    """Its runs are known to be finished, of the rows and settings that are asked for, and give the same numbers."""
    wanted = json.loads(Path("compared/comparison.json").read_text())
    monkeypatch.setattr(compare, "SCRIPT", Path("nothing may be trained.py"))
    monkeypatch.setattr(compare, "write_report", lambda summary, folder: _write(summary))
    script(monkeypatch, compare.main, "--config", "comparison.yaml")
    assert capsys.readouterr().err.count("done already") == 2
    found = json.loads(Path("found.json").read_text())
    assert found == {name: wanted[name] for name in found} and {"variants", "notes"} < found.keys()


def _write(summary: dict) -> None:
    Path("found.json").write_text(json.dumps(summary))


def test_a_comparison_begun_otherwise_is_refused(compared, monkeypatch):
    with pytest.raises(SystemExit, match="local_steps was 1 and is 2"):
        script(monkeypatch, compare.main, "--config", "comparison.yaml", "--local_steps", "2")


def test_evaluations_are_taken_up_and_give_the_same_numbers_again(compared, monkeypatch, capsys):
    """Nothing is asked where the results lie. Elsewhere, the model, the adapter, the rows and the prompts are known by
    the same hashes, and every question is answered alike."""
    before = {path.name: path.read_bytes() for path in Path("evaluated").iterdir()}
    script(monkeypatch, evaluate.main, "--config", "recipe.yaml", *recorded.EVALUATED)
    assert {path.name: path.read_bytes() for path in Path("evaluated").iterdir() if path.suffix != ".png"} == before
    script(monkeypatch, evaluate.main, "--config", "recipe.yaml", *recorded.EVALUATED, "--results_dir", "again")
    results = sorted(Path("evaluated").glob("*.results.json"))
    assert len(results) == 2
    for path in results:
        wanted, found = (json.loads((folder / path.name).read_text()) for folder in (path.parent, Path("again")))
        assert found.keys() == wanted.keys()
        for key in wanted.keys() - {"time", "seconds", "versions"}:
            assert found[key] == wanted[key], key
    script(monkeypatch, leaderboard.main, "evaluated", "again", "compared/runs")
    assert capsys.readouterr().out.count("50.0") > 6
