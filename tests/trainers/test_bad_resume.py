"""Law 9 on disk: what cannot be resumed or would overwrite a run is refused, and whatever was there stays."""

import errno
import logging
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fslora_hf.config.federation import FederatedSketchConfig
from fslora_hf.storage.checkpoint import STATE_NAME
from fslora_hf.trainers.sft import FederatedSketchTrainer
from tests.support import tiny
from tests.support.worker_train import QUIET, SMALL, ledger

RUN = {**QUIET, **SMALL, "num_rounds": 2, "local_steps": 1, "save_rounds": 1, "server_optim": "adam"}
STEPS = 5  # five clients, one at a time


def make(folder, *, rows=None, lora=None, **args) -> FederatedSketchTrainer:
    config = tiny.lora_config()
    for name, value in (lora or {}).items():
        setattr(config, name, value)
    return FederatedSketchTrainer(
        model=tiny.base_model(),
        args=FederatedSketchConfig(output_dir=str(folder), **{**RUN, **args}),
        train_dataset=tiny.tokenised() if rows is None else rows,
        processing_class=tiny.tokenizer(),
        peft_config=config,
    )


def files(folder) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    make(folder).train()
    return folder


@pytest.fixture
def folder(whole_run, tmp_path):
    """A copy of a run of two rounds with a checkpoint after each."""
    return Path(shutil.copytree(whole_run, tmp_path / "run"))


def refused(message: str, trainer, folder, resume) -> None:
    """An error before any step, after which every file of the run is as it was."""
    before = files(folder)
    with pytest.raises(ValueError, match=message):
        trainer.train(resume_from_checkpoint=resume)
    assert trainer.state.global_step == 0
    assert files(folder) == before


def change_token(rows):
    changed = rows.to_list()
    changed[0]["input_ids"][-1] ^= 1
    return type(rows).from_list(changed)


def fewer_clients(rows):
    return rows.filter(lambda row: row["client_id"] != 8)


OTHERS = {
    "seed": ({"seed": 7}, "seed was 42 and is 7"),
    "data_seed": ({"data_seed": 7}, "data_seed was None and is 7"),
    "rank law": (
        {"rank_distribution": "uniform", "max_rank": 6},
        "rank_distribution was 'homogeneous' and is 'uniform'",
    ),
    "ranks": ({"client_ranks": [1, 2, 3, 4, 6]}, r"client_ranks was None and is '?\[1, 2, 3, 4, 6\]"),
    "method": ({"method": "fedit"}, "method was 'fslora' and is 'fedit'"),
    "number of clients": ({"rows": fewer_clients}, "clients was 5 and is 4.*data was '.*' and is '"),
    "data": ({"rows": change_token}, "data was '[0-9a-f]{32}' and is '[0-9a-f]{32}'"),
    "cohort": ({"clients_per_round": 3}, "clients_per_round was 5 and is 3"),
    "server": (
        {"server_optim": "sgd"},
        "server_learning_rate was 0.001 and is 1.0.*server_optim was 'adam' and is 'sgd'",
    ),
    "batch": ({"gradient_accumulation_steps": 2}, "examples a local step was 2 and is 4"),
    "LoRA scale": ({"lora": {"lora_alpha": 5}}, "lora lora_alpha was 12 and is 5"),
    "adapted modules": (
        {"lora": {"target_modules": {"q_proj", "v_proj"}}},
        "adapted layers was '6 entries, .* and is '",
    ),
    "adapted layers": (
        {"lora": {"layers_to_transform": [0]}},
        "adapted layers was '6 entries, .* and is .*layers.0.mlp",
    ),
}


@pytest.mark.parametrize("case", OTHERS)
def test_resuming_another_run_says_what_differs(folder, case):
    changes, message = OTHERS[case]
    changes = dict(changes)
    if "rows" in changes:
        changes["rows"] = changes["rows"](tiny.tokenised())
    refused(
        f"Expected a checkpoint of this run, found another's .*{message}.* Use the settings",
        make(folder, **changes),
        folder,
        True,
    )


def test_a_layout_is_no_part_of_what_a_run_is(folder):
    trainer = make(folder, per_device_train_clients=3, num_rounds=3)
    trainer.train(resume_from_checkpoint=True)
    assert [line["round"] for line in ledger(folder)] == [0, 1, 2]


def test_an_output_directory_that_holds_another_run(folder):
    message = (
        "Expected an output_dir without a run, found rounds.jsonl, checkpoint-10, checkpoint-5 in .*: resume that"
    )
    refused(message, make(folder), folder, None)
    refused(message, make(folder), folder, False)
    (folder / "rounds.jsonl").unlink()
    refused("found checkpoint-10, checkpoint-5 in .*: resume", make(folder), folder, None)
    shutil.rmtree(folder / "checkpoint-5"), shutil.rmtree(folder / "checkpoint-10")
    (folder / "rounds.jsonl").write_text('{"round": 0}\n')
    refused("found rounds.jsonl in .*: resume", make(folder), folder, None)


def test_a_checkpoint_of_elsewhere_is_not_resumed_into_a_folder_with_a_run(folder, tmp_path):
    other = Path(shutil.copytree(folder, tmp_path / "other"))
    refused("Expected an output_dir without a run", make(folder), folder, str(other / "checkpoint-5"))
    fresh = tmp_path / "fresh"
    make(fresh).train(resume_from_checkpoint=str(other / "checkpoint-5"))
    assert [line["round"] for line in ledger(fresh)] == [0, 1] and files(other) == files(folder)
    for name in ("adapter_model.safetensors", "federated_state.safetensors"):
        assert (fresh / "checkpoint-10" / name).read_bytes() == (folder / "checkpoint-10" / name).read_bytes()


def test_true_passes_over_unfinished_folders_with_a_warning(folder, caplog):
    expected = load_file(folder / "checkpoint-10" / "adapter_model.safetensors")
    (folder / "checkpoint-10" / STATE_NAME).unlink()
    trainer = make(folder)
    with caplog.at_level(logging.WARNING):
        trainer.train(resume_from_checkpoint=True)
    assert f"Passing over the unfinished checkpoint {folder / 'checkpoint-10'}." in caplog.messages
    assert trainer.state.global_step == 2 * STEPS
    ended = load_file(folder / "checkpoint-10" / "adapter_model.safetensors")
    assert all(torch.equal(ended[name], expected[name]) for name in expected)
    assert [line["round"] for line in ledger(folder)] == [0, 1]
    assert (folder / "checkpoint-10-unfinished").is_dir()  # kept: it is the user's to throw away


def test_a_named_unfinished_folder(folder):
    (folder / "checkpoint-10" / STATE_NAME).unlink()
    message = f"Expected a finished checkpoint in .*checkpoint-10, found no {STATE_NAME}: name a finished one"
    refused(message, make(folder), folder, str(folder / "checkpoint-10"))
    refused("Expected a finished checkpoint in .*/none, found no", make(folder), folder, str(folder / "none"))


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "federated_state.safetensors", "trainer_state.json"])
@pytest.mark.parametrize("named", [True, False])
def test_a_checksum_mismatch(folder, name, named):
    path = folder / "checkpoint-10" / name
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)
    message = (
        rf"Expected .*{name} with the checksum [0-9a-f]{{12}}, found [0-9a-f]{{12}}: the file was damaged or changed"
    )
    refused(message, make(folder), folder, str(path.parent) if named else True)


def test_nothing_to_resume(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    refused("Expected a finished checkpoint in .*, found none: start without", make(tmp_path), tmp_path, True)


def test_a_run_killed_before_its_first_checkpoint_begins_again_only_as_itself(folder, caplog):
    expected = files(folder / "checkpoint-10")["adapter_model.safetensors"]
    shutil.rmtree(folder / "checkpoint-5"), shutil.rmtree(folder / "checkpoint-10")
    refused("found another's in .*seed was 42 and is 7", make(folder, seed=7), folder, True)
    make(folder).train(resume_from_checkpoint=True)
    assert any("the run begins again at its first round" in message for message in caplog.messages)
    assert files(folder / "checkpoint-10")["adapter_model.safetensors"] == expected
    assert [line["round"] for line in ledger(folder)] == [0, 1]


def test_more_rounds_in_the_checkpoint_than_in_the_run(folder):
    message = "Expected a checkpoint of at most num_rounds=1 rounds, found 2 in .*: raise num_rounds, or resume"
    refused(message, make(folder, num_rounds=1), folder, True)


@pytest.mark.parametrize("writer", ["fslora_hf.rounds.server.save_file", "os.fsync", "peft.peft_model.safe_save_file"])
def test_no_disk_space_during_a_save(folder, tmp_path, monkeypatch, writer):
    """The second checkpoint fails in the middle; the first is whole, and the run goes on from it later."""
    run = tmp_path / "full"
    expected = files(folder / "checkpoint-10")
    trainer = make(run)
    finish = trainer._save_checkpoint

    def full_disk(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    def save_checkpoint(*args, **kwargs):
        if trainer.state.global_step == 2 * STEPS:
            monkeypatch.setattr(writer, full_disk)
        return finish(*args, **kwargs)

    trainer._save_checkpoint = save_checkpoint
    message = "Expected to write the checkpoint .*checkpoint-10, found 'No space left on device': make room, and"
    with pytest.raises(OSError, match=message):
        trainer.train()
    monkeypatch.undo()
    assert sorted(path.name for path in run.glob("*checkpoint*")) == ["checkpoint-5"]
    for name in ("adapter_model.safetensors", "federated_state.safetensors"):
        assert (run / "checkpoint-5" / name).read_bytes() == (folder / "checkpoint-5" / name).read_bytes()
    if writer == "os.fsync":
        make(run).train(resume_from_checkpoint=True)
        for name in ("adapter_model.safetensors", "federated_state.safetensors"):
            assert (run / "checkpoint-10" / name).read_bytes() == expected[name]
