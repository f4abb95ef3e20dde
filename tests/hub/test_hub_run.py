"""A run whose rounds go to the Hub: through the real client, in both modes of upload."""

import subprocess

import pytest
import torch
from peft import PeftModel
from transformers import TrainerCallback

from fslora_hf.common.masking import mask
from fslora_hf.hub.outbox import OUTBOX_NAME, Outbox
from tests.support import tiny
from tests.support.hub_calls import READS, WRITES
from tests.support.hub_runs import LORA, ROUNDS, RUN, check_rounds, send, train
from tests.support.worker_train import build

pytest_plugins = ("tests.support.hub_client",)
pytestmark = pytest.mark.slow


def test_rounds_are_commits_with_tags(hub, users, on_client, upload_mode, tmp_path):
    found = on_client(train, str(tmp_path / "run"))
    assert found["missing"] == [] and "round-0006" in found["table"]
    check_rounds(hub, tmp_path / "run")
    files = hub.find("user/run").files("round-0004")
    assert {"README.md", "adapter_config.json", "rounds.jsonl", "rounds.png", "training_args.json"} <= files.keys()
    assert len(files["rounds.jsonl"].splitlines()) == 4
    assert "federated_state.safetensors" not in files
    assert b'revision="round-0004"' in files["README.md"] and b"`round-0002`, `round-0004`" in files["README.md"]
    assert files["rounds.png"].startswith(b"\x89PNG")
    everything = b"".join(content for content in files.values())
    assert WRITES.encode() not in everything  # no token in any file
    assert not [*(tmp_path / "run" / OUTBOX_NAME).glob("*/f*/")]  # bounded disk: neither files nor figures stay


def logits(folder_or_repo: str, revision: str | None = None) -> torch.Tensor:
    """In the client's process: plain PEFT on the base model, from a folder or the Hub."""
    model = PeftModel.from_pretrained(tiny.base_model(torch.float32), folder_or_repo, revision=revision)
    return model(torch.arange(2, 12)[None]).logits.detach()


def test_each_tag_loads_in_plain_peft_and_git_agrees(hub, users, on_client, upload_mode, tmp_path):
    """The client's caches are empty; git reads what the API wrote."""
    on_client(train, str(tmp_path / "run"), per_device_train_clients=2)  # steps are rounds then
    for number in ROUNDS:
        local = on_client(logits, str(tmp_path / "run" / f"checkpoint-{number}"))
        assert torch.equal(on_client(logits, "user/run", f"round-{number:04d}"), local)
    assert torch.equal(on_client(logits, "user/run"), local)
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "-q", hub.find("user/run").folder, clone], check=True)

    def git(*arguments: str) -> list[str]:
        command = ["git", "-C", clone, *arguments]
        return subprocess.run(command, capture_output=True, check=True, text=True).stdout.splitlines()

    titles = git("log", "--reverse", "--format=%s")
    assert [title for title in titles if title.startswith("Round")] == [f"Round {number}" for number in ROUNDS]
    assert git("tag") == [f"round-{number:04d}" for number in ROUNDS]
    git("fsck", "--strict", "--full")
    assert len((clone / "rounds.jsonl").read_text().splitlines()) == ROUNDS[-1]


@pytest.mark.parametrize(
    "fault",
    [
        {"stall_s": 0.5, "times": None},
        {"status": 503, "times": 2},
        {"reset": True, "times": 1},
        {"drop_answer": True, "times": 1},
    ],
    ids=["slow", "failing", "resetting", "lost answer"],
)
def test_a_hub_that_fails_now_and_then(hub, users, on_client, tmp_path, fault):
    hub.fault("commit", **fault)
    assert on_client(train, str(tmp_path / "run"))["missing"] == []
    check_rounds(hub, tmp_path / "run")


@pytest.mark.parametrize(
    "fault", [{"stall_s": 60}, {"status": 503}, {"reset": True}], ids=["slow", "failing", "resetting"]
)
def test_a_hub_that_fails_all_the_time_ends_no_training_and_is_sent_later(hub, users, on_client, tmp_path, fault):
    hub.fault("commit", **fault, times=None)
    found = on_client(train, str(tmp_path / "run"), hub_deadline=1.0)
    assert found["missing"] == [*ROUNDS]
    assert len(Outbox(tmp_path / "run" / OUTBOX_NAME).pending()) == 3
    hub.mend()
    assert on_client(send, str(tmp_path / "run")) == []
    check_rounds(hub, tmp_path / "run")


def test_no_network_at_all(hub, users, on_client, tmp_path):
    hub.fault("", reset=True, times=None)
    assert on_client(train, str(tmp_path / "run"), hub_deadline=1.0)["missing"] == [*ROUNDS]
    hub.mend()
    assert on_client(send, str(tmp_path / "run")) == []
    check_rounds(hub, tmp_path / "run")


def train_on_a_full_disk(folder: str) -> dict:
    """The third round's snapshot meets a full disk, and the second's a flaw in what draws up its card."""
    from fslora_hf.hub import outbox, publisher

    describe, render = outbox._describe, publisher.render_card

    def full(round, *args):
        if round == 6:
            raise OSError(28, "No space left on device")
        return describe(round, *args)

    def flawed(context):
        if context.rounds_done == 4:
            raise RuntimeError("a flaw")
        return render(context)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(outbox, "_describe", full)
        patch.setattr(publisher, "render_card", flawed)
        return train(folder)


def test_a_snapshot_that_fails_ends_no_training_and_is_reported(hub, users, on_client, tmp_path):
    found = on_client(train_on_a_full_disk, str(tmp_path / "run"))
    assert found["missing"] == [4, 6]
    assert "found 'No space left on device'" in found["table"] and "found RuntimeError('a flaw')" in found["table"]
    assert sorted(hub.find("user/run").refs()) == ["refs/heads/main", "refs/tags/round-0002"]
    # The checkpoint of the last round is there, so that a resumed run pushes it.
    assert on_client(train, str(tmp_path / "run"), True)["missing"] == []
    assert "refs/tags/round-0006" in hub.find("user/run").refs()


def test_what_is_told_before_the_first_step(hub, users, on_client, tmp_path):
    hub.create("other/run")
    for changes, text in (
        ({"hub_token": "hf_nobody"}, "token"),
        ({"hub_token": READS}, "write"),
        ({"hub_model_id": "other/run"}, "other/run"),
        ({"hub_model_id": "user/not a name"}, "not a name"),
        ({"hub_strategy": "every_save", "hub_always_push": True}, "hub_always_push"),
    ):
        refused = on_client(train, str(tmp_path / "run"), **changes)["refused"]
        assert text in refused and "hf_" not in refused, refused
    assert not (tmp_path / "run" / "rounds.jsonl").exists()


class Stops(TrainerCallback):
    """Ends training at the third round's end."""

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.epoch >= 3


class StopsWithin(Stops):
    """Ends training in the middle of the fourth round."""

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.epoch > 3


def train_and_stop(folder: str, stops: type[Stops]) -> list[int]:
    trainer = build(folder, RUN, LORA, dtype=torch.float32, callbacks=[stops()])
    trainer.train()
    return [snapshot.round for snapshot, _ in trainer.push_to_hub().rows]


@pytest.mark.parametrize("stops", [Stops, StopsWithin])
def test_the_last_whole_round_of_a_run_that_is_stopped(hub, users, on_client, tmp_path, stops):
    assert on_client(train_and_stop, str(tmp_path / "run"), stops) == [2, 3]
    assert "refs/tags/round-0003" in hub.find("user/run").refs()


def push_by_hand(folder: str) -> list:
    """What `trainer.push_to_hub()` gives after training with a Hub that failed, and without any pushing."""
    trainer = build(folder, {**RUN, "hub_deadline": 2.0, "num_rounds": 2}, LORA, dtype=torch.float32)
    trainer.train()
    before = trainer.publisher.report.missing
    after = []
    while [] not in after and len(after) < 10:  # how much of a push fits into the deadline depends on the machine
        after.append(trainer.push_to_hub(commit_message="Now").missing)
    after.append(trainer.push_to_hub().missing)
    quiet = build(f"{folder}-quiet", {**RUN, "push_to_hub": False}, LORA, dtype=torch.float32)
    with pytest.raises(ValueError, match="^Expected push_to_hub=True in the configuration, found False: set it"):
        quiet.push_to_hub()
    return [before, *after]


def test_push_to_hub_sends_what_is_missing(hub, users, on_client, tmp_path):
    hub.fault("commit", status=503, times=2)
    first, *between, last = on_client(push_by_hand, str(tmp_path / "run"))
    assert first == [2] and between[-1] == last == []
    assert all(missing == [2] for missing in between[:-1])
    assert sorted(hub.find("user/run").refs()) == ["refs/heads/main", "refs/tags/round-0002"]


def test_tokens_in_nested_settings_stay_here(hub, users, on_client, tmp_path):
    secret = {"lr_scheduler_kwargs": {"token": "hf_secretsecret", "deep": [{"hub_token": "hf_secretsecret"}]}}
    assert mask(secret) == {"lr_scheduler_kwargs": {"token": "<TOKEN>", "deep": [{"hub_token": "<HUB_TOKEN>"}]}}
    on_client(train, str(tmp_path / "run"), model_init_kwargs={"token": "hf_secretsecret"}, num_rounds=2)
    files = hub.find("user/run").files("round-0002")
    assert b'"token": "<TOKEN>"' in files["training_args.json"]
    assert not [name for name, content in files.items() if b"hf_secret" in content]


def test_hand_edits_of_the_card_stay(hub, users, on_client, tmp_path):
    on_client(train, str(tmp_path / "run"), num_rounds=2)
    card = hub.find("user/run").files("main")["README.md"].decode()
    edited = card.replace("---\n", "---\nlicense: mit\n", 1) + "\n## Mine\n\nAsk me.\n"
    hub.add("user/run", {"README.md": edited.encode()})
    on_client(train, str(tmp_path / "run"), str(tmp_path / "run" / "checkpoint-4"))
    card = hub.find("user/run").files("main")["README.md"].decode()
    assert "license: mit" in card and "Ask me." in card and 'revision="round-0006"' in card
    assert 'revision="round-0002"' not in card and card.count("<!-- fslora_hf:begin -->") == 1
