"""Saves that do not fall on a planned round end, and runs taken up from an earlier checkpoint."""

import logging
import re

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from fslora_hf.launch import claimed
from fslora_hf.models.adapter import global_pair
from fslora_hf.storage.checkpoint import CheckpointError, last_checkpoint, read_state
from fslora_hf.storage.ledger import read_records
from fslora_hf.trainers.resume import OccupiedError
from tests.support import reference, tiny
from tests.trainers.test_trainer import make

STEADY = {"lr_scheduler_type": "constant"}


class StopWithin(TrainerCallback):
    """Saves and stops at a step within a round, as a time limit would."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            control.should_save = control.should_training_stop = True


def rounds_in(folder) -> list[int]:
    return [record["round"] for record in read_records(folder / "rounds.jsonl")]


def test_a_save_at_a_stop_within_a_round_holds_the_last_whole_round(tmp_path):
    whole = make(tmp_path / "whole", num_rounds=3, save_rounds=1, **STEADY)
    whole.train()
    steps = whole.layout.steps_per_round
    stop = StopWithin(2 * steps + 1)
    make(tmp_path / "stopped", num_rounds=3, save_rounds=0, callbacks=[stop], **STEADY).train()
    saved = tmp_path / "stopped" / f"checkpoint-{2 * steps}"
    assert read_state(saved)["round"] == 2
    expected = tmp_path / "whole" / saved.name / "adapter_model.safetensors"
    assert (saved / "adapter_model.safetensors").read_bytes() == expected.read_bytes()
    again = make(tmp_path / "stopped", num_rounds=3, save_rounds=0, **STEADY)
    again.train(resume_from_checkpoint=True)
    for side, other in zip(global_pair(again.model), global_pair(whole.model), strict=True):
        for name, tensor in side.items():
            assert torch.equal(tensor, other[name])
    assert rounds_in(tmp_path / "stopped") == [0, 1, 2]


def test_checkpoints_after_the_one_resumed_from_are_kept_aside(tmp_path, caplog):
    """Else a rotation by rounds would keep them and remove what the resumed run writes."""
    first = make(tmp_path, num_rounds=4, save_rounds=1, **STEADY)
    first.train()
    steps = first.layout.steps_per_round
    with caplog.at_level(logging.WARNING):
        again = make(tmp_path, num_rounds=2, save_rounds=1, save_total_limit=1, **STEADY)
        again.train(str(tmp_path / f"checkpoint-{steps}"))
    assert f"superseded-checkpoint-{4 * steps}" in caplog.text
    assert read_state(last_checkpoint(tmp_path))["round"] == 2 and rounds_in(tmp_path) == [0, 1]
    assert len(list(tmp_path.glob("superseded-checkpoint-*"))) == 3


def test_a_trained_adapter_is_no_start_for_the_same_run(tmp_path):
    trainer = make(tmp_path, num_rounds=1, save_rounds=0)
    trainer.train()
    with pytest.raises(CheckpointError, match="Expected the initial adapter.*found one of 1 rounds.*build"):
        trainer.train(resume_from_checkpoint=True)
    assert rounds_in(tmp_path) == [0]


def test_an_evaluating_callback_within_a_round_sees_the_global_adapter(tmp_path):
    tokens, seen = torch.tensor([[3, 4, 5]]), {}

    class Sampler(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step == 1:
                model.eval()
                with torch.no_grad():
                    seen["logits"] = model(input_ids=tokens).logits
                model.train()

    trainer = make(tmp_path, num_rounds=1, save_rounds=0, callbacks=[Sampler()])
    trainer.model.eval()
    with torch.no_grad():
        before = trainer.model(input_ids=tokens).logits
    trainer.train()
    assert torch.equal(seen["logits"], before)


def test_rows_without_a_client_may_be_filtered_away(tmp_path):
    rows = tiny.tokenised()
    ids = [None if i == 0 else value for i, value in enumerate(rows["client_id"])]
    rows = rows.remove_columns("client_id").add_column("client_id", ids)
    make(tmp_path, rows=rows.filter(lambda row: row["client_id"] is not None), num_rounds=1, save_rounds=0).train()


def test_a_checkpoint_holds_the_global_adapter_and_nothing_of_clients(tmp_path):
    """The very tensors that PEFT would save of the model without clients in it."""
    trainer = make(tmp_path, num_rounds=1, save_rounds=1)
    trainer.train()
    trainer.model.save_pretrained(tmp_path / "plain")
    saved = load_file(tmp_path / f"checkpoint-{trainer.layout.steps_per_round}" / "adapter_model.safetensors")
    plain = load_file(tmp_path / "plain" / "adapter_model.safetensors")
    assert saved.keys() == plain.keys() and not any("client" in name for name in saved)
    assert all(torch.equal(saved[name], plain[name]) for name in saved)
    assert not any("client" in name for name, _ in trainer.model.named_parameters())


def test_a_second_call_of_train_is_refused_and_names_the_line_that_goes_on(tmp_path):
    """As a notebook's cells are run again: the call alone, or all that builds the trainer, too."""
    trainer = make(tmp_path, save_rounds=1, **STEADY)
    trainer.train()
    end, told = reference.read_adapter(trainer.model), r"resume that run with trainer\.train\((.*)\), or choose"
    for again in (trainer, make(tmp_path, save_rounds=1, **STEADY)):
        with pytest.raises(OccupiedError, match=told) as refused:
            again.train()
        (line,) = re.findall(told, str(refused.value))
        output = again.train(**eval(f"dict({line})"))  # as it is told
        assert output.global_step == 2 * trainer.layout.steps_per_round
        assert reference.max_difference(reference.read_adapter(again.model), end) == 0
    longer = make(tmp_path, save_rounds=1, num_rounds=3, **STEADY)
    longer.train(resume_from_checkpoint=True)
    assert rounds_in(tmp_path) == [0, 1, 2]
    longer.args.num_rounds = 4  # of the very trainer, in a notebook's next cell
    longer.train(resume_from_checkpoint=True)
    assert rounds_in(tmp_path) == [0, 1, 2, 3]


def test_a_script_is_told_before_the_model_is_loaded(tmp_path):
    make(tmp_path, save_rounds=1, num_rounds=1, **STEADY).train()
    with pytest.raises(SystemExit, match="resume that run with --resume_from_checkpoint true, or choose"):
        with claimed(str(tmp_path), anew=True):
            raise AssertionError("nothing is loaded")
    with claimed(str(tmp_path)):
        pass
