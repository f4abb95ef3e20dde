"""Runs that are taken up from the Hub, and what keeps two runs apart there."""

import hashlib
import json
import subprocess
from pathlib import Path

import pytest

from fslora_hf.hub.fetch import fetch_round
from fslora_hf.hub.outbox import OUTBOX_NAME
from fslora_hf.storage.state_file import digest
from tests.support.hub_calls import WRITES
from tests.support.hub_repository import Link
from tests.support.hub_runs import ROUNDS, check_same, send, train
from tests.support.worker_train import ledger

pytest_plugins = ("tests.support.hub_client",)
pytestmark = pytest.mark.slow


def sealed(state: dict) -> bytes:
    """A state file with the checksum of what it says, as a liar would write it."""
    return json.dumps({**state, "digest": digest(state)}).encode()


def test_a_run_goes_on_from_the_hub_on_an_empty_disk(hub, users, on_client, tmp_path):
    whole, first, second = (tmp_path / name for name in ("whole", "first", "second"))
    state = {"push_resume_state": True}
    on_client(train, str(whole), **state, hub_model_id="user/whole")
    on_client(train, str(first), **state, num_rounds=4)
    found = on_client(train, str(second), "hub", **state)
    assert found["missing"] == [], found
    for name in ("adapter_model.safetensors", "federated_state.safetensors"):
        check_same(second / "checkpoint-12" / name, whole / "checkpoint-12" / name)
    for one, other in zip(ledger(whole), ledger(second), strict=True):
        assert {**one, "seconds": 0} == {**other, "seconds": 0}
    repository = hub.find("user/run")
    titles = [commit["title"] for commit in repository.log("main")]
    assert [titles.count(f"Round {number}") for number in ROUNDS] == [1, 1, 1]
    assert sorted(path.name for path in second.glob("checkpoint-*")) == ["checkpoint-12", "checkpoint-8"]
    assert not (second / ".hub_resume").exists()
    # From an earlier round, its later ones are there already, with the same weights.
    third = tmp_path / "third"
    assert on_client(train, str(third), "user/run@round-0002", **state)["missing"] == []
    check_same(
        third / "checkpoint-12" / "adapter_model.safetensors", whole / "checkpoint-12" / "adapter_model.safetensors"
    )
    assert [commit["title"] for commit in repository.log("main")] == titles


def test_a_resumed_run_takes_the_round_before_to_a_new_repository(hub, users, on_client, tmp_path):
    """Each folder and each repository is whole by itself: what it began from is there, too."""
    on_client(train, str(tmp_path / "first"), num_rounds=4, push_to_hub=False)
    on_client(train, str(tmp_path / "second"), str(tmp_path / "first" / "checkpoint-8"))
    assert sorted(hub.find("user/run").refs()) == [
        "refs/heads/main",
        "refs/tags/round-0004",
        "refs/tags/round-0006",
    ]


def test_what_cannot_be_resumed_from_the_hub(hub, users, on_client, tmp_path):
    on_client(train, str(tmp_path / "plain"), hub_model_id="user/plain")
    on_client(train, str(tmp_path / "run"), push_resume_state=True)

    def refused(resume: str, name: str = "new", **changes) -> str:
        return on_client(train, str(tmp_path / name), resume, push_to_hub=False, **changes)["refused"]

    found = refused("user/plain@round-0002")
    assert found.startswith("Expected what a run is resumed from in user/plain at round 2, found adapter_config.json")
    assert found.endswith("name a round that was pushed with push_resume_state.")
    assert refused("user/run@round-0009").startswith("Expected the state of a run in user/run@round-0009 on the Hub")
    assert "Expected a checkpoint of this run, found another's" in refused("hub", seed=5)
    assert "found resume_from_checkpoint=hub without hub_model_id" in refused("hub", hub_model_id=None)
    assert "Expected an output_dir without a run" in refused("hub", "run")
    files = hub.find("user/run").files("main")
    state = json.loads(files["federated_state.json"])
    for name in ("../evil.json", "run.py", "model.pkl", "/etc/x.json"):
        changed = {**state, "files": {**state["files"], name: "0" * 64}}
        hub.add("user/run", {"federated_state.json": sealed(changed)})
        assert "found damage (" in (said := refused("hub")) and name in said
    for name, value in (("round", -3), ("round", "2"), ("round", float("inf")), ("run", []), ("files", None)):
        hub.add("user/run", {"federated_state.json": sealed({**state, name: value})})
        assert f" for {'a round' if name == 'round' else name})" in refused("hub"), (name, value)
    hub.add("user/run", {"federated_state.json": sealed({**state, "round": 10**9})})
    assert "rounds.jsonl does not hold the rounds before" in refused("hub")
    many = {**state["files"], **{f"{n}.json": "0" * 64 for n in range(200)}}
    hub.add("user/run", {"federated_state.json": sealed({**state, "files": many})})
    assert "found damage (206 files in federated_state.json)" in refused("hub")
    hub.add("user/run", {"federated_state.json": json.dumps({**state, "round": 2}).encode()})
    assert "found damage (its checksum is not that of its content)" in refused("hub")
    hub.add("user/run", {"federated_state.json": b"[" * 100_000})
    assert "found damage" in refused("hub")
    for content in (b"x", Link("/etc/passwd")):
        restored = {"federated_state.json": files["federated_state.json"], "adapter_model.safetensors": content}
        hub.add("user/run", restored)
        assert "the file was damaged or changed" in refused("hub")
    ledger = files["rounds.jsonl"].replace(b'"round": 0', b'"round": 7')
    hub.add("user/run", {name: files[name] for name in ("adapter_model.safetensors",)} | {"rounds.jsonl": ledger})
    assert "rounds.jsonl with the checksum" in refused("hub")
    sums = json.loads(files["federated_state.json"])
    sums["files"]["rounds.jsonl"] = hashlib.sha256(ledger).hexdigest()
    hub.add("user/run", {"federated_state.json": sealed(sums)})
    assert "found damage (rounds.jsonl does not hold the rounds before)" in refused("hub")
    assert not (tmp_path / "new" / ".hub_resume").exists()


def test_an_output_dir_with_rounds_of_another_run(hub, users, on_client, tmp_path):
    """What they hold is not taken for this run's rounds."""
    on_client(train, str(tmp_path / "run"))
    for path in (tmp_path / "run").iterdir():
        if path.name != OUTBOX_NAME:
            subprocess.run(["rm", "-r", path], check=True)
    refused = on_client(train, str(tmp_path / "run"), seed=7)["refused"]
    assert refused.startswith("Expected an output_dir without a run, found hub_outbox/round-0002")


def test_another_run_is_told_before_the_first_step(hub, users, on_client, tmp_path):
    """Its rounds would stand between, or in place of, those of the first."""
    on_client(train, str(tmp_path / "run"))
    before = hub.find("user/run").refs()
    for changes in ({}, {"hub_revision": "other"}):
        refused = on_client(train, str(tmp_path / "other"), seed=7, push_rounds=1, **changes)["refused"]
        assert refused.startswith("Expected no rounds in user/run, or those of this run, found another's: seed was 42")
    assert not (tmp_path / "other" / "rounds.jsonl").exists()
    assert before.items() <= hub.find("user/run").refs().items()


def test_another_run_is_told_when_the_hub_is_back(hub, users, on_client, tmp_path):
    on_client(train, str(tmp_path / "run"))
    log = hub.find("user/run").log("main")
    hub.fault("", reset=True, times=None)
    assert on_client(train, str(tmp_path / "other"), seed=7, hub_deadline=1.0)["missing"] == [*ROUNDS]
    hub.mend()
    assert on_client(send, str(tmp_path / "other")) == [*ROUNDS]
    assert hub.find("user/run").log("main") == log


def test_another_target_than_before(hub, users, on_client, tmp_path):
    run = tmp_path / "run"
    on_client(train, str(run), num_rounds=4)
    for changes in ({"hub_model_id": "user/second"}, {"hub_revision": "second"}):
        refused = on_client(train, str(run), True, **changes)["refused"]
        assert refused.startswith("Expected to push to user/run (main), where this run's rounds went before")


def test_a_branch_of_its_own(hub, users, on_client, tmp_path):
    """Pushed to a branch, and taken up from there by the same configuration."""
    changes = {"hub_revision": "exp", "push_resume_state": True}
    assert on_client(train, str(tmp_path / "run"), num_rounds=4, **changes)["missing"] == []
    assert on_client(train, str(tmp_path / "new"), "hub", **changes)["missing"] == []
    refs = hub.find("user/run").refs()
    assert refs["refs/heads/exp"] == refs["refs/tags/round-0006"] and {"refs/tags/round-0002"} < refs.keys()


def test_a_commit_whose_tag_was_refused_is_tagged_by_who_takes_the_run_up(hub, users, on_client, tmp_path):
    state = {"push_resume_state": True}
    hub.fault("tag", status=403, times=None)
    assert on_client(train, str(tmp_path / "first"), num_rounds=2, **state)["missing"] == [2]
    hub.mend()
    assert on_client(train, str(tmp_path / "second"), "hub", **state)["missing"] == []
    titles = [commit["title"] for commit in hub.find("user/run").log("main")]
    assert [titles.count(f"Round {number}") for number in ROUNDS] == [1, 1, 1]
    assert {f"refs/tags/round-{number:04d}" for number in ROUNDS} < hub.find("user/run").refs().keys()


def resume_with(folder: str, token: str) -> tuple[str, list[str]]:
    """The sentence, and the text of every error behind it."""
    try:
        fetch_round("user/run", None, Path(folder), token)
    except ValueError as error:
        return str(error), [repr(behind) for behind in (error.__cause__,) if behind]


def test_no_token_is_in_the_error_of_a_resume(hub, users, on_client, tmp_path):
    for token in ("hf_secret1234\n", "hf_schl\u00fcssel", "hf_unknown12345"):
        sentence, behind = on_client(resume_with, str(tmp_path / "x"), token)
        assert sentence.startswith("Expected") and token.strip()[3:] not in sentence and not behind
    hub.fault("", reset=True, times=None)
    assert on_client(resume_with, str(tmp_path / "x"), WRITES)[0].startswith("Expected the state of a run in user/run")
