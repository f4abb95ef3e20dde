"""What a snapshot holds: the same files with the same content, whoever asks for them."""

import pytest

from fslora_hf.storage.checkpoint import SERVER_NAME, STATE_NAME, read_state
from fslora_hf.trainers.saving import TRAINER_STATE, files_to_resume_from
from tests.support.worker_train import build

ARGS = {"num_rounds": 1, "local_steps": 1, "clients_per_round": 2, "max_rank": 4, "save_rounds": 1}


def contents(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("method", ["fslora", "flora"])
def test_a_saved_model_is_a_checkpoint_without_what_a_run_goes_on_from(tmp_path, method):
    trainer = build(tmp_path / "run", {**ARGS, "method": method})
    trainer.train()
    trainer.save_model(str(tmp_path / "model"))
    checkpoint, model = (contents(tmp_path / name) for name in ("run/checkpoint-2", "model"))
    for name in (SERVER_NAME, TRAINER_STATE, STATE_NAME):
        del checkpoint[name]
    checkpoint.pop("README.md"), model.pop("README.md", None)  # the card, which is told elsewhere
    assert model == checkpoint


@pytest.mark.parametrize("method", ["fslora", "flora"])
def test_all_that_a_run_is_resumed_from_is_written_and_has_a_checksum(tmp_path, method):
    trainer = build(tmp_path, {**ARGS, "method": method})
    trainer.train()
    needed = files_to_resume_from(method == "flora")
    assert {*needed} <= {*read_state(tmp_path / "checkpoint-2")["files"]}
    assert [name for name in contents(tmp_path / "checkpoint-2") if "base" in name] == [
        needed[-1]
    ] * trainer.learned.folds
