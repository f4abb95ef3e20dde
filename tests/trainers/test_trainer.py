"""The trainer as its user sees it: logs, evaluation, saves, callbacks, early stops, and what a run leaves behind."""

import functools
import threading

import pytest
import torch
from torch.nn import functional as F
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from fslora_hf.config.federation import FederatedSketchConfig
from fslora_hf.trainers.callbacks import RoundCallback
from fslora_hf.trainers.sft import FederatedSketchTrainer
from tests.support import reference, tiny
from tests.support.worker_train import QUIET, SMALL, ledger

RUN = {**QUIET, **SMALL, "num_rounds": 2, "local_steps": 2, "client_ranks": [1, 2, 3, 4, 6]}
STEPS = 10  # of a round: five clients, one at a time, two local steps each


def make(
    folder, *, callbacks=None, rows=None, eval_rows=None, model=None, lora=None, **args
) -> FederatedSketchTrainer:
    return FederatedSketchTrainer(
        model=tiny.base_model() if model is None else model,
        args=FederatedSketchConfig(output_dir=str(folder), **{**RUN, **args}),
        train_dataset=tiny.tokenised() if rows is None else rows,
        eval_dataset=eval_rows,
        processing_class=tiny.tokenizer(),
        peft_config=tiny.lora_config(**{"zero_b": False, **(lora or {})}),
        callbacks=callbacks,
    )


def at(step: int, action, event: str = "on_step_end") -> TrainerCallback:
    """A callback that calls `action(control)` at an event of a global step; counted from 1 at its end."""

    class At(TrainerCallback):
        pass

    def react(self, args, state, control, **kwargs):
        if state.global_step == step:
            action(control)

    setattr(At, event, react)
    return At()


def train_and_read(trainer) -> reference.Adapter:
    trainer.train()
    return reference.read_adapter(trainer.model)


# ---- Logging and evaluation ----


def scored(model, rows, dataset):
    """Mean loss, entropy and accuracy over the scored tokens of some rows, each row alone, and all their tokens."""
    losses, entropies, correct = [], [], []
    for row in rows:
        ids, labels = (torch.tensor(dataset[row][name]) for name in ("input_ids", "labels"))
        with torch.no_grad():
            logits = model(input_ids=ids[None]).logits[0, :-1]
        keep = labels[1:] != -100
        losses.append(F.cross_entropy(logits[keep], labels[1:][keep], reduction="none"))
        entropies.append(torch.distributions.Categorical(logits=logits[keep]).entropy())
        correct.append((logits[keep].argmax(-1) == labels[1:][keep]).double())
    tokens = sum(len(dataset[row]["input_ids"]) for row in rows)
    return *(torch.cat(part).mean().item() for part in (losses, entropies, correct)), tokens


def test_trls_metrics_are_logged(tmp_path):
    """At rate 0 the model stays what it was, so that every logged number can be computed from the plan."""
    trainer = make(tmp_path, learning_rate=0.0, logging_steps=2, num_rounds=1, client_ranks=[6] * 5)
    model = tiny_global(trainer)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "mean_token_accuracy" in entry]
    tokens_so_far = 0
    assert len(logs) == 5
    for entry, client in zip(logs, trainer.round_plan(0).clients, strict=True):
        rows = client.example_ids.reshape(-1).tolist()
        _, entropy, accuracy, tokens = scored(model, rows, trainer.train_dataset)
        steps = [scored(model, step, trainer.train_dataset)[0] for step in client.example_ids.tolist()]
        tokens_so_far += tokens
        assert entry["loss"] == pytest.approx(sum(steps) / 2, rel=1e-5)
        assert entry["entropy"] == pytest.approx(entropy, rel=1e-9)
        assert entry["mean_token_accuracy"] == pytest.approx(accuracy, rel=1e-9)
        assert entry["num_tokens"] == tokens_so_far
        assert entry["learning_rate"] == 0.0 and entry["grad_norm"] > 0
    (record,) = ledger(tmp_path)
    assert record["losses"] == pytest.approx([entry["loss"] for entry in logs], rel=1e-5)


TOKEN_METRICS = {"entropy", "mean_token_accuracy", "num_tokens"}


@pytest.mark.parametrize("eval_rounds", [0, 1])
def test_a_run_shorter_than_logging_steps_tells_trls_metrics_at_its_end(tmp_path, eval_rounds):
    """As SFTTrainer's last log does, of the steps since the last one; evaluations name the tokens trained so far."""
    rows = tiny.tokenised(seed=5).select(range(6))
    trainer = make(tmp_path / "a", learning_rate=0.0, client_ranks=[6] * 5, eval_rows=rows, eval_rounds=eval_rounds)
    model = tiny_global(trainer)
    trainer.train()
    planned = [
        [row for client in trainer.round_plan(t).clients for row in client.example_ids.reshape(-1).tolist()]
        for t in range(2)
    ]
    _, entropy, accuracy, tokens = scored(model, planned[0] + planned[1], trainer.train_dataset)
    evaluated = [entry["eval_num_tokens"] for entry in trainer.state.log_history if "eval_num_tokens" in entry]
    assert evaluated == ([scored(model, planned[0], trainer.train_dataset)[3], tokens] if eval_rounds else [])
    last = trainer.state.log_history[-1]
    assert last["num_tokens"] == tokens and "train_runtime" in last
    assert last["entropy"] == pytest.approx(entropy, rel=1e-9)
    assert last["mean_token_accuracy"] == pytest.approx(accuracy, rel=1e-9)
    # A call after the run counts no token twice.
    assert trainer.evaluate(rows)["eval_loss"] and trainer.state.log_history[-1]["eval_num_tokens"] == tokens


def test_sfttrainers_last_log_has_the_same_metrics(tmp_path):
    trainer = SFTTrainer(
        model=tiny.base_model(),
        args=SFTConfig(output_dir=str(tmp_path / "sft"), **QUIET, max_steps=3, save_strategy="no"),
        train_dataset=tiny.tokenised().remove_columns("client_id"),
        processing_class=tiny.tokenizer(),
        peft_config=tiny.lora_config(),
    )
    trainer.train()
    mine = make(tmp_path / "mine", logging_steps=STEPS)  # the last step was logged, and nothing is left to tell
    mine.train()
    assert TOKEN_METRICS <= trainer.state.log_history[-1].keys()
    assert not TOKEN_METRICS & mine.state.log_history[-1].keys()


def tiny_global(trainer):
    """A plain model that computes with the trainer's global adapter as it is now."""
    config = tiny.lora_config()
    return reference.rank_k_model(tiny.base_model(), config, reference.read_adapter(trainer.model), config.r).eval()


@pytest.mark.parametrize("block", [1, 3])
def test_the_rounds_summary_is_logged(tmp_path, block):
    trainer = make(tmp_path, per_device_train_clients=block)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "clients_accepted" in entry]
    for number, (entry, record) in enumerate(zip(logs, ledger(tmp_path), strict=True), start=1):
        assert entry["round"] == entry["epoch"] == number and entry["clients_accepted"] == 5
        assert entry["client_loss"] == pytest.approx(sum(record["losses"]) / 5)
        assert entry["megabytes_up"] == record["bytes_up"] / 1e6
    assert [record["round"] for record in ledger(tmp_path)] == [0, 1]


def test_the_learning_rate_is_the_rounds(tmp_path):
    trainer = make(tmp_path, logging_steps=1, num_rounds=3, lr_scheduler_type="linear", warmup_steps=1)
    trainer.train()
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "grad_norm" in entry]
    assert rates == pytest.approx([0.0] * STEPS + [1e-2] * STEPS + [5e-3] * STEPS)
    assert [record["learning_rate"] for record in ledger(tmp_path)] == pytest.approx([0.0, 1e-2, 5e-3])
    assert [trainer.round_plan(t).learning_rate for t in range(3)] == pytest.approx([0.0, 1e-2, 5e-3])


def test_evaluation_sees_the_global_adapter_while_a_client_is_in_the_model(tmp_path):
    """Asked for in the middle of a client's turn, by control and by call; and at round ends."""
    rows = tiny.tokenised(seed=5).select(range(6))
    seen = []

    def evaluate(control):
        before = trainer._stack.clients
        seen.append((trainer.evaluate()["eval_loss"], loss_now()))
        assert before == trainer._stack.clients == 1

    def loss_now():
        model = tiny_global(trainer)
        batches = [scored(model, range(start, min(start + 8, 6)), rows)[0] for start in range(0, 6, 8)]
        return sum(batches) / len(batches)

    mid = at(STEPS + 3, evaluate)
    asked = at(STEPS + 5, lambda control: setattr(control, "should_evaluate", True))
    trainer = make(tmp_path / "a", eval_rows=rows, eval_rounds=1, callbacks=[mid, asked], learning_rate=0.1)
    end = train_and_read(trainer)
    evaluated = {e["step"]: e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e}
    assert list(evaluated) == [STEPS, STEPS + 3, STEPS + 5, 2 * STEPS]
    # The adapter is the same from a round's end to the next one's.
    assert evaluated[STEPS] == evaluated[STEPS + 3] == evaluated[STEPS + 5] != evaluated[2 * STEPS]
    assert seen[0][0] == pytest.approx(seen[0][1], rel=1e-6)
    assert evaluated[2 * STEPS] == pytest.approx(loss_now(), rel=1e-6)
    assert trainer.evaluate()["eval_loss"] == evaluated[2 * STEPS]
    # And evaluating changes nothing: the same run without it ends alike.
    undisturbed = train_and_read(make(tmp_path / "b", learning_rate=0.1))
    assert reference.max_difference(end, undisturbed) == 0


# ---- Saves and stops ----


def test_a_save_asked_for_within_a_round_is_taken_at_its_end(tmp_path, caplog):
    save = at(3, lambda control: setattr(control, "should_save", True))
    trainer = make(tmp_path, callbacks=[save], num_rounds=3)
    trainer.train()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == [f"checkpoint-{STEPS}"]
    assert "A checkpoint was asked for within a round; it is taken at the round's end." in caplog.messages


@pytest.mark.parametrize("save_rounds, steps", [(0, []), (1, [1, 2, 3]), (2, [2, 3]), (5, [3])])
def test_save_rounds(tmp_path, save_rounds, steps):
    make(tmp_path, num_rounds=3, local_steps=1, save_rounds=save_rounds).train()
    assert sorted(int(path.name.split("-")[1]) // 5 for path in tmp_path.glob("checkpoint-*")) == steps


def test_nothing_is_pickled(tmp_path):
    make(tmp_path, save_rounds=1, server_optim="adam", optim="adamw_torch").train()
    paths = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.suffix for path in paths} == {".safetensors", ".json", ".jsonl", ".md"}
    pickles = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")  # zipped, and protocols 2 to 5
    assert not [path for path in paths if path.read_bytes().startswith(pickles)]


def check_left_clean(trainer, expected: reference.Adapter) -> None:
    """`default` holds `expected`, is active and trainable, and the model computes with it and nothing else."""
    model = trainer.model
    assert model.active_adapters == ["default"]
    assert reference.max_difference(reference.read_adapter(model), expected) == 0
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(trainable) == 12 and all(".default." in name and "lora_" in name for name in trainable)
    ids = torch.tensor([[3, 4, 5, 6]])
    with torch.no_grad():
        expected_logits = tiny_global(trainer)(input_ids=ids).logits
        torch.testing.assert_close(model.eval()(input_ids=ids).logits, expected_logits, rtol=0, atol=1e-12)


@pytest.mark.parametrize("step", [1, STEPS + 3, 2 * STEPS])
def test_stopping_early_leaves_the_last_whole_round(tmp_path, step):
    whole = step // STEPS
    start = reference.read_adapter(make(tmp_path / "start").model)
    stop = at(step, lambda control: setattr(control, "should_training_stop", True))
    stopped = make(tmp_path / "stopped", num_rounds=4, callbacks=[stop])
    stopped.train()
    assert stopped.state.global_step == step
    assert len(ledger(tmp_path / "stopped")) == whole if whole else not (tmp_path / "stopped/rounds.jsonl").exists()
    end = train_and_read(make(tmp_path / "whole", num_rounds=whole)) if whole else start
    check_left_clean(stopped, end)


class Trouble(RuntimeError):
    pass


def test_an_error_in_the_middle_leaves_the_last_whole_round(tmp_path):
    def fail(control):
        raise Trouble

    trainer = make(tmp_path / "a", callbacks=[at(STEPS + 2, fail, "on_pre_optimizer_step")], num_rounds=3)
    with pytest.raises(Trouble):
        trainer.train()
    check_left_clean(trainer, train_and_read(make(tmp_path / "b", num_rounds=1)))


def test_after_a_run_the_adapter_is_trainable_and_can_be_merged(tmp_path):
    trainer = make(tmp_path)
    start = reference.read_adapter(trainer.model)
    end = train_and_read(trainer)
    assert reference.max_difference(start, end) > 1e-4
    check_left_clean(trainer, end)
    ids = torch.tensor([[3, 4, 5, 6]])
    with torch.no_grad():
        logits = trainer.model(input_ids=ids).logits
        merged = trainer.model.merge_and_unload()
        torch.testing.assert_close(merged(input_ids=ids).logits, logits, rtol=0, atol=1e-10)


# ---- Callbacks ----


class Watching(RoundCallback):
    """Notes who was handed over, what the optimizer then held, and what was folded."""

    def __init__(self):
        super().__init__()
        self.blocks, self.records, self.states = [], [], []

    def hand_over(self, wave):
        block = super().hand_over(wave)
        self.blocks.append([client.client_id for client in block])
        self.states.append({k: v.clone() for s in self.trainer.optimizer.state.values() for k, v in s.items()})
        return block

    def aggregate(self):
        self.records.append(super().aggregate())
        return self.records[-1]


@pytest.mark.parametrize("given", ["an instance", "a class"])
def test_a_round_callback_takes_the_built_ins_place(tmp_path, given):
    watching = Watching() if given == "an instance" else Watching
    trainer = make(tmp_path / "a", callbacks=[watching], per_device_train_clients=2)
    end = train_and_read(trainer)
    round_callbacks = [c for c in trainer.callback_handler.callbacks if isinstance(c, RoundCallback)]
    assert [type(callback) for callback in round_callbacks] == [Watching]
    (used,) = round_callbacks
    assert used.records == ledger(tmp_path / "a") and len(used.blocks) == 6
    by_rank = [[c.client_id for c in sorted(trainer.round_plan(t).clients, key=lambda c: c.rank)] for t in (0, 1)]
    assert [c for block in used.blocks for c in block] == by_rank[0] + by_rank[1]
    assert reference.max_difference(end, train_and_read(make(tmp_path / "b", per_device_train_clients=2))) == 0


def test_the_next_round_is_planned_while_this_one_trains(tmp_path):
    """The first is asked for at once; all others were planned, once, by the time they are needed."""
    planned = []

    class Waiting(RoundCallback):
        def aggregate(self):
            self.trainer.run._ahead.submit(int).result(30)  # behind the plan, in the same thread
            return super().aggregate()

    trainer = make(tmp_path, callbacks=[Waiting], num_rounds=3)
    plan = trainer.run.plan.__wrapped__

    def watched(round):
        planned.append((round, threading.current_thread().name.split("_")[0]))
        return plan(round)

    trainer.run.plan = functools.lru_cache(4)(watched)
    trainer.train()
    assert planned == [(0, "MainThread"), (1, "plan"), (2, "plan")]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("plan")]


def test_two_round_callbacks_are_refused(tmp_path):
    """Each would fold every round."""
    with pytest.raises(ValueError, match="Expected .*RoundCallback.*found 2"):
        make(tmp_path, callbacks=[Watching(), RoundCallback()])
