"""Beside a step the model is the global adapter's, and nothing done there changes the run; a subclass's own loss."""

import pytest
import torch
from transformers import TrainerCallback
from trl import LogCompletionsCallback, SFTConfig, SFTTrainer

from fslora_hf.config.federation import FederatedSketchConfig
from fslora_hf.trainers.sft import FederatedSketchTrainer
from tests.support import reference, tiny
from tests.support.worker_train import QUIET, SMALL, build, ledger

IDS = torch.tensor([[3, 4, 5, 6, 7]])
EVENTS = ["on_step_begin", "on_substep_end", "on_pre_optimizer_step", "on_optimizer_step", "on_step_end"]
ARGS = {"num_rounds": 2, "local_steps": 2, "gradient_accumulation_steps": 2, "seed": 3}


class Beside(TrainerCallback):
    """Forwards in both modes at every event within a round, and an answer drawn at random beside each step."""

    def __init__(self):
        self.calls = 0

    def look(self, model, event):
        self.calls += 1
        was_training = model.training
        if event in ("on_step_begin", "on_step_end"):
            model.generate(input_ids=IDS, do_sample=True, max_new_tokens=2)
        with torch.no_grad():
            model.train()(input_ids=IDS.repeat(3, 1))  # draws dropout's numbers
            model.eval()(input_ids=IDS)
        model.train(was_training)


for event in EVENTS:
    setattr(Beside, event, lambda self, args, state, control, model, on=event, **kwargs: self.look(model, on))


def trained(folder, callbacks, **args):
    shards = tiny.tokenised({0: 3, 5: 2, 9: 4})
    trainer = build(folder, {**ARGS, **args}, {"dropout": 0.1}, dataset=shards, callbacks=callbacks)
    trainer.train()
    return trainer


@pytest.mark.parametrize(
    "block, method, checkpointing", [(1, "fslora", False), (2, "fslora", True), (2, "flora_residual", False)]
)
def test_generation_and_forwards_in_callbacks_change_nothing(tmp_path, block, method, checkpointing):
    args = {"per_device_train_clients": block, "method": method, "activation_checkpointing": checkpointing}
    alone = trained(tmp_path / "alone", None, **args)
    beside = Beside()
    watched = trained(tmp_path / "watched", [beside], **args)
    assert reference.max_difference(reference.read_adapter(alone.model), reference.read_adapter(watched.model)) == 0
    assert beside.calls == 2 * alone.layout.steps_per_round * len(EVENTS)
    for line, other in zip(ledger(tmp_path / "alone"), ledger(tmp_path / "watched"), strict=True):
        assert line["losses"] == other["losses"]


def test_what_callbacks_compute_is_the_global_adapters(tmp_path):
    """Of the last round's end, whatever clients are loaded; in training mode too, where dropout is 0."""
    seen = []

    class Look(TrainerCallback):
        def on_step_begin(self, args, state, control, model, **kwargs):
            assert model.training or state.global_step == 0
            with torch.no_grad():
                seen.append((reference.read_adapter(model), model.train()(input_ids=IDS).logits))

    trainer = build(tmp_path, {**ARGS, "per_device_train_clients": 2}, callbacks=[Look()])
    start, plain = reference.read_adapter(trainer.model), build(tmp_path / "plain", ARGS).model.train()
    trainer.train()
    for number, (pairs, logits) in enumerate(seen):
        assert (reference.max_difference(pairs, start) > 1e-6) == (number >= trainer.layout.steps_per_round)
        reference.write_adapter(plain, pairs)
        with torch.no_grad():
            torch.testing.assert_close(logits, plain(input_ids=IDS).logits, rtol=0, atol=1e-12)
    assert len(seen) == 2 * trainer.layout.steps_per_round


def completions(trainer) -> list:
    callback = LogCompletionsCallback(trainer, freq=1, num_prompts=3)
    trainer.add_callback(callback)
    trainer.train()
    return callback.table


@pytest.mark.parametrize("checkpointing", [False, True])
def test_log_completions_callback_works_as_under_sft_trainer(tmp_path, checkpointing):
    quiet = {**QUIET, "activation_checkpointing": checkpointing, "per_device_train_batch_size": 2}
    rows, evaluated = tiny.texts({0: 6, 1: 6}), tiny.texts({0: 3}).remove_columns("client_id")
    args = FederatedSketchConfig(output_dir=str(tmp_path / "ours"), **{**SMALL, **quiet}, num_rounds=1, local_steps=2)
    parts = {"eval_dataset": evaluated, "processing_class": tiny.tokenizer(), "peft_config": tiny.lora_config()}
    ours = FederatedSketchTrainer(tiny.base_model(), args, train_dataset=rows, **parts)
    plain_args = SFTConfig(output_dir=str(tmp_path / "plain"), **quiet, max_steps=4, save_strategy="no")
    plain = SFTTrainer(tiny.base_model(), plain_args, train_dataset=rows, **parts)
    told = completions(ours)
    assert len(told) == len(completions(plain)) == 4 * 3
    assert {step for step, *_ in told} == {str(step) for step in range(1, 5)}


class KeepsLosses(FederatedSketchTrainer):
    """Holds every loss of clients with its graph, as one that plots them at the end might."""

    def client_losses(self, *args):
        losses = super().client_losses(*args)
        self.kept.append(losses)
        return losses


class KeepsOutputs(FederatedSketchTrainer):
    """A loss of its own, held with its graph and the outputs that it is of."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs, use_cache=False)
        self.kept.append(outputs.loss)
        return (outputs.loss, outputs) if return_outputs else outputs.loss


class Forgets(KeepsOutputs):
    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        self.kept[-1] = self.kept[-1].detach()
        return loss


@pytest.mark.parametrize(
    "kind, twin, block", [(KeepsLosses, FederatedSketchTrainer, 2), (KeepsOutputs, Forgets, 1)], ids=["two", "own"]
)
@pytest.mark.filterwarnings("ignore:`return_outputs=True`")
def test_losses_kept_over_hand_overs_change_nothing(tmp_path, kind, twin, block):
    """Five clients of five ranks: every block has another shape than the one before it."""
    args = {**ARGS, "client_ranks": [4, 1, 6, 2, 3], "optim": "adamw_torch", "weight_decay": 0.1}
    ends = []
    for cls in (kind, twin):
        folder = tmp_path / cls.__name__
        every = {**QUIET, **SMALL, **args, "max_grad_norm": 0.05, "per_device_train_clients": block}
        trainer = cls(
            model=tiny.base_model(),
            args=FederatedSketchConfig(output_dir=str(folder), **every),
            train_dataset=tiny.tokenised(),
            processing_class=tiny.tokenizer(),
            peft_config=tiny.lora_config(),
        )
        trainer.kept = []
        trainer.train()
        ends.append((reference.read_adapter(trainer.model), [line["losses"] for line in ledger(folder)]))
        if cls is kind:
            assert len(trainer.kept) == trainer.state.global_step * 2
            assert all(loss.grad_fn is not None for loss in trainer.kept)
    assert reference.max_difference(ends[0][0], ends[1][0]) == 0 and ends[0][1] == ends[1][1]


def test_a_borrowed_step_adds_no_floating_point_operations(tmp_path):
    trainer = build(tmp_path, ARGS)
    assert trainer.floating_point_ops({"input_ids": IDS}) > 0
    trainer._step_borrowed = True
    assert trainer.floating_point_ops({"input_ids": IDS}) == 0


# ---- A subclass's own loss ----


class OwnLoss:
    """The model's own loss, which is a token mean over what it is given."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        assert {"attention_mask", "labels"} <= set(inputs) <= {"input_ids", "attention_mask", "labels"}
        outputs = model(**inputs, use_cache=False)
        return (outputs.loss, outputs) if return_outputs else outputs.loss


class Halved:
    """SFTTrainer's loss with something made of it and of the outputs, as in TRL's examples."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        assert outputs.logits.shape[:2] == inputs["input_ids"].shape
        return (0.5 * loss, outputs) if return_outputs else 0.5 * loss


class Ours(OwnLoss, FederatedSketchTrainer):
    pass


class OursHalved(Halved, FederatedSketchTrainer):
    pass


class Plain(OwnLoss, SFTTrainer):
    pass


class PlainHalved(Halved, SFTTrainer):
    pass


@pytest.mark.parametrize("kind, twin", [(Ours, Plain), (OursHalved, PlainHalved)])
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.filterwarnings("ignore:`return_outputs=True`")
def test_a_subclasss_loss_trains_one_client_a_step_as_sft_trainer(tmp_path, kind, twin, accumulation):
    """One client of full rank, one round: law 4 with another loss, and the ledger tells of that loss."""
    rows, steps = tiny.tokenised({0: 12}), 3
    every = {**QUIET, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "lr_scheduler_type": "constant"}
    every |= {"gradient_accumulation_steps": accumulation, "logging_steps": 1}
    args = FederatedSketchConfig(output_dir=str(tmp_path / "ours"), **every, num_rounds=1, local_steps=steps)
    lora = tiny.lora_config(zero_b=False)
    parts = {"processing_class": tiny.tokenizer(), "peft_config": lora}
    ours = kind(model=tiny.base_model(), args=args, train_dataset=rows, **parts)
    planned = ours.round_plan(0).clients[0].example_ids.reshape(-1)
    batches = rows.select(planned.tolist()).remove_columns("client_id")
    plain_args = SFTConfig(output_dir=str(tmp_path / "plain"), **every, max_steps=steps, save_strategy="no")
    plain_args.train_sampling_strategy = "sequential"
    plain = twin(model=tiny.base_model(), args=plain_args, train_dataset=batches, **parts)
    reference.write_adapter(plain.model, reference.read_adapter(ours.model))
    ours.train()
    plain.train()
    difference = reference.max_difference(reference.read_adapter(ours.model), reference.read_adapter(plain.model))
    assert difference < 1e-6
    losses = [entry["loss"] for entry in plain.state.log_history if "loss" in entry]
    (record,) = ledger(tmp_path / "ours")
    assert record["losses"] == pytest.approx([sum(losses) / steps], rel=1e-4)


@pytest.mark.parametrize("block", [2, "auto"])
def test_a_subclasss_loss_with_more_clients_a_step_is_refused_by_name(tmp_path, block):
    args = FederatedSketchConfig(output_dir=str(tmp_path), **QUIET, num_rounds=1, per_device_train_clients=block)
    message = rf"Expected per_device_train_clients to be 1 .* Ours.compute_loss, .*found {block}: set it to 1"
    with pytest.raises(ValueError, match=message):
        Ours(model="/no/such/model", args=args, train_dataset=tiny.tokenised(), peft_config=tiny.lora_config())
