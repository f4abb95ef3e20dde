"""Runs that learn nothing, or nothing good any more: how they end, and what they leave to go on from."""

import json
import logging
import math
import random
import sys
import time

import pytest
import torch

from fslora_hf.launch import finish
from fslora_hf.models.adapter import global_pair
from fslora_hf.rounds.watch import PAST_ROUNDS, RunLost, RunWatch
from fslora_hf.storage.checkpoint import last_checkpoint, proven_checkpoint, read_state, rotate, whole_folder
from fslora_hf.storage.ledger import append_round, last_records, read_records
from fslora_hf.trainers.callbacks import RoundCallback
from fslora_hf.updates.bounds import NOT_FINITE
from fslora_hf.updates.part import RefusedUpdate
from recipes import quickstart, train
from tests.support import federated, tiny
from tests.support.worker_train import build, ledger

ARGS = {"num_rounds": 6, "local_steps": 1, "clients_per_round": 3, "save_rounds": 1}


class Poison(RoundCallback):
    """Spoils what clients begin with, when a round is folded."""

    def __init__(self, round: int, spoil):
        super().__init__()
        self.round, self.spoil = round, spoil

    def aggregate(self):
        record = super().aggregate()
        if record["round"] == self.round:
            self.spoil(self.trainer)
        return record


def huge(trainer, factor: float = 100.0) -> None:
    """As of an adapter that makes the model sure of what is wrong; that of a random model cannot."""
    trainer.model.get_base_model().lm_head.weight.data.mul_(factor)


def infinite(trainer) -> None:
    for tensor in trainer.global_tensors:
        tensor.data.fill_(math.inf)


def rounds_saved(folder) -> list[int]:
    return sorted(read_state(path)["round"] for path in folder.glob("checkpoint-*"))


def refuse(update):
    raise RefusedUpdate("it is not wanted")


def same_adapters(trainer, other) -> bool:
    sides = zip(global_pair(trainer.model), global_pair(other.model), strict=True)
    return all(torch.equal(one[name], two[name]) for one, two in sides for name in one)


# ---- Which checkpoints stay ----


@pytest.mark.parametrize(
    "limit, saved",
    [(None, [1, 2, 3, 4]), (0, [1, 2, 3, 4]), (-1, [1, 2, 3, 4]), (1, [3, 4]), (2, [3, 4]), (3, [2, 3, 4])],
)
def test_save_total_limit_counts_as_the_trainers_and_spares_the_last_proven_checkpoint(tmp_path, limit, saved):
    """With 1, the one that the last round proved stays beside the last round's own, which nothing has proved yet."""
    build(tmp_path, ARGS | {"num_rounds": 4, "save_total_limit": limit}).train()
    assert rounds_saved(tmp_path) == saved


def test_a_proven_checkpoint_leaves_as_soon_as_a_newer_one_is_proven(tmp_path):
    seen = {}

    class Look(RoundCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            super().on_step_begin(args, state, control, **kwargs)
            seen[state.global_step // 3] = rounds_saved(tmp_path)

    build(tmp_path, ARGS | {"save_rounds": 2, "save_total_limit": 1}, callbacks=[Look()]).train()
    assert seen == {0: [], 1: [], 2: [2], 3: [2], 4: [2, 4], 5: [4]} and rounds_saved(tmp_path) == [4, 6]


@pytest.mark.parametrize("proven, left", [(9, [4]), (4, [4]), (3, [3, 4]), (2, [2, 4]), (1, [2, 4]), (0, [2, 4])])
def test_rotation_spares_the_newest_checkpoint_that_is_proven_or_else_the_oldest(tmp_path, proven, left):
    for round in (2, 3, 4):
        with whole_folder(tmp_path / f"checkpoint-{round}", round, {}) as folder:
            (folder / "adapter").write_text("")
    good = proven_checkpoint(tmp_path, proven)
    assert (good and read_state(good)["round"]) == (min(proven, 4) if proven >= 2 else None)
    rotate(tmp_path, 1, proven)
    assert rounds_saved(tmp_path) == left


# ---- Runs that fold nothing ----


def test_a_run_that_folds_nothing_ends_with_a_sentence_and_everything_kept(tmp_path, caplog):
    """NaN in the base: every update is refused."""
    trainer = build(tmp_path, ARGS)
    trainer.model.get_base_model().lm_head.weight.data[0] = math.nan
    with caplog.at_level(logging.INFO), pytest.raises(RunLost) as error:
        trainer.train()
    assert str(error.value).startswith(
        "Expected a run that learns, found 3 rounds in a row that are lost (the last: the "
    )
    assert "resume_from_checkpoint=" not in str(error.value)  # nothing is known to be good
    assert "and start anew in another output_dir; max_lost_rounds says" in str(error.value)
    assert "Rounds 0 to 2 are over: 0 of 9 updates were folded into the global adapter." in caplog.text
    assert len(ledger(tmp_path)) == 3 and read_state(last_checkpoint(tmp_path))["round"] == 3
    assert not trainer.in_run


@pytest.mark.parametrize("changes, rounds", [({"num_rounds": 2}, 2), ({"max_lost_rounds": 0}, 6)])
def test_a_run_that_ends_before_it_is_given_up_may_not_have_folded_nothing(tmp_path, monkeypatch, changes, rounds):
    federated.take_by(monkeypatch, refuse)
    why = "the last: no update was folded: it is not wanted"
    with pytest.raises(RunLost, match=f"found none of {3 * rounds} updates folded in {rounds} rounds .{why}"):
        build(tmp_path, ARGS | changes).train()
    assert len(ledger(tmp_path)) == rounds


def test_rounds_that_fold_nothing_count_across_a_resume_and_in_a_row_only(tmp_path, monkeypatch):
    """Two, then one that folds; two, then a stop, and one more."""
    wanted = {2}
    federated.take_by(monkeypatch, lambda update: update if trainer.rounds_done in wanted else refuse(0))
    trainer = build(tmp_path, ARGS | {"num_rounds": 5, "lr_scheduler_type": "constant"})
    trainer.train()
    trainer = build(tmp_path, ARGS | {"num_rounds": 9, "lr_scheduler_type": "constant"})
    with pytest.raises(
        RunLost, match="found 3 rounds in a row.*go on from .* resume_from_checkpoint=.*checkpoint-15, or"
    ):
        trainer.train(resume_from_checkpoint=True)
    assert [line["round"] for line in ledger(tmp_path)] == [0, 1, 2, 3, 4, 5]


def test_the_end_of_a_run_says_how_many_updates_were_folded(tmp_path, monkeypatch, caplog):
    refused = []

    def refuse_first(update):
        refused.append(update)
        return update if len(refused) > 1 else refuse(update)

    federated.take_by(monkeypatch, refuse_first)
    trainer = build(tmp_path, ARGS | {"num_rounds": 2})
    trainer.train()
    assert "Rounds 0 to 1 are over: 5 of 6 updates were folded into the global adapter." in caplog.text
    assert finish(trainer).endswith("\n\n5 of 6 updates were folded into the global adapter.")


# ---- Runs whose adapter is spoiled ----


@pytest.mark.parametrize("spoil, lost", [(huge, [3, 4, 5]), (infinite, [2, 3, 4])])
def test_a_poisoned_adapter_never_takes_the_place_of_the_last_good_checkpoint(tmp_path, caplog, spoil, lost):
    args = ARGS | {"num_rounds": 8, "save_total_limit": 1, "lr_scheduler_type": "constant"}
    whole = build(tmp_path / "whole", args)
    whole.train()
    with pytest.raises(RunLost) as error:
        build(tmp_path / "run", args, callbacks=[Poison(2, spoil)]).train()
    assert [line["round"] for line in ledger(tmp_path / "run") if "suspect" in line] == lost
    assert f"Round {lost[0]} is suspect: the " in caplog.text
    good = tmp_path / "run" / "checkpoint-6"
    assert rounds_saved(tmp_path / "run") == [2, lost[-1] + 1]
    assert "found 3 rounds in a row that are lost (the last: the losses or updates of 3 of 3 clients" in str(
        error.value
    )
    assert f"go on from its last good checkpoint with resume_from_checkpoint={good}, or start anew" in str(error.value)
    again = build(tmp_path / "run", args)
    again.train(resume_from_checkpoint=str(good))
    assert same_adapters(again, whole) and [line["round"] for line in ledger(tmp_path / "run")] == list(range(8))
    assert not any("suspect" in line for line in ledger(tmp_path / "run"))


@pytest.mark.parametrize(
    "spoil, rounds, most, found",
    [
        (
            infinite,
            3,
            3,
            "found a global adapter that is not finite:",
        ),  # in the last round: no loss has told of it yet
        (infinite, 3, 0, "found a global adapter that is not finite:"),
        (huge, 4, 3, "found a last round that is lost .the losses or updates of 3 of 3 clients"),
        (huge, 4, 0, None),
    ],
)
def test_a_run_whose_last_round_is_lost_does_not_end_well(tmp_path, spoil, rounds, most, found):
    changes = {"num_rounds": rounds, "max_lost_rounds": most, "save_total_limit": 1}
    trainer = build(tmp_path, ARGS | changes, callbacks=[Poison(2, spoil)])
    if found is None:
        trainer.train()
    else:
        with pytest.raises(RunLost, match=found + ".*resume_from_checkpoint=.*checkpoint-6, or"):
            trainer.train()
    assert rounds_saved(tmp_path) == [2, rounds]


@pytest.mark.parametrize("poisoned, most", [(4, 3), (2, 2)])
def test_a_lost_run_ends_so_again_however_often_it_is_resumed(tmp_path, poisoned, most):
    """As one that was killed between its last checkpoint and its end would, and one that is submitted once more."""
    changes = ARGS | {"max_lost_rounds": most}
    with pytest.raises(RunLost) as first:
        build(tmp_path, changes, callbacks=[Poison(poisoned, huge)]).train()
    rounds = len(ledger(tmp_path))
    with pytest.raises(RunLost) as second:
        build(tmp_path, changes).train(resume_from_checkpoint=True)
    assert str(second.value) == str(first.value) and len(ledger(tmp_path)) == rounds
    build(tmp_path, changes | {"max_lost_rounds": 0}).train(resume_from_checkpoint=True)  # as its field allows


def test_a_run_that_recovers_goes_on_and_proves_later_checkpoints(tmp_path, caplog):
    class Passing(Poison):
        def aggregate(self):
            record = super().aggregate()
            if record["round"] == self.round + 1:
                huge(self.trainer, 0.01)
            return record

    build(tmp_path, ARGS | {"save_total_limit": 1}, callbacks=[Passing(2, huge)]).train()
    assert [line["round"] for line in ledger(tmp_path) if "suspect" in line] == [3]
    assert rounds_saved(tmp_path) == [5, 6]


# ---- The judgement itself ----


def record(round: int, losses: list, refused=()) -> dict:
    clients = list(range(len(losses)))
    return {"round": round, "clients": clients, "losses": losses,
            "refused": [{"client_id": client, "reason": reason} for client, reason in refused]}  # fmt: skip


SOUND = [torch.ones(2)]
SILENT = "it did not answer within 5 s"


@pytest.mark.parametrize(
    "losses, refused, suspect",
    [
        ([1.0, 2.0, 3.0, 50.0], (), False),
        ([1.0, 2.0, 40.0, 50.0], (), False),  # not most
        ([1.0, 30.0, 40.0, 50.0], (), True),
        ([4.9, 4.9, 4.9, 4.9], (), False),  # twice 2.5, which is more than 2 above it, is where a leap begins
        ([5.1, 5.1, 5.1, 5.1], (), True),
        ([1.0, None, None, None], [(1, SILENT), (2, SILENT), (3, SILENT)], False),  # nothing is known of the silent
        ([None, None, None, None], [(i, SILENT) for i in range(4)], False),  # which proves nothing either
        ([None, 40.0, None, None], [(0, SILENT), (2, SILENT), (3, SILENT)], True),
        ([None, None, None, 1.0], [(0, NOT_FINITE), (1, NOT_FINITE), (2, NOT_FINITE)], True),
        ([1.0, 1.0, 1.0, 1.0], [(0, NOT_FINITE), (1, NOT_FINITE), (2, NOT_FINITE)], True),
        ([1.0, 1.0, 1.0, 1.0], [(i, "the norm is beyond the bound") for i in range(4)], False),  # empty, not suspect
        ([None, None, None, None], (), True),  # folded, of losses that are not finite
    ],
)
def test_a_round_is_suspect_if_most_of_those_heard_of_are_spoiled(losses, refused, suspect):
    watch = RunWatch([record(i, [2.5, 1.9, 2.6, 2.5]) for i in range(3)], 3, 3)
    assert ("suspect" in watch.judge(record(3, losses, refused), SOUND)) == suspect
    assert watch.proven == (2 if suspect or losses.count(None) == 4 else 3)


def test_cohorts_of_one_whose_clients_differ_do_not_end_a_run():
    watch = RunWatch([], 0, 3)
    for round, loss in enumerate([0.2, 3.0, 0.1, 5.9, 0.1, 4.0, 0.01, 6.0]):
        assert watch.judge(record(round, [loss]), SOUND) == {}
    assert watch.judge(record(8, [12.1]), SOUND) and not watch.run_is_lost and watch.proven == 7


@pytest.mark.parametrize("clients, most_lost", [(1, 0), (2, 0), (3, 6), (5, 6)])
def test_hard_clients_that_are_met_late_do_not_end_a_run(clients, most_lost):
    """Of 100 runs in which three of ten clients have losses that look like a leap beside the others'."""
    lost = 0
    for seed in range(100):
        draw, watch = random.Random(seed), RunWatch([], 0, 3)
        for round in range(100):
            line = record(round, [draw.choice([3.2] * 3 + [0.5] * 7) for _ in range(clients)])
            watch.judge(line, SOUND)
            if watch.run_is_lost:
                lost += 1
                break
    assert lost <= most_lost  # about a third where a leap that passes proves nothing


def test_of_a_single_client_a_round_more_must_tell_that_losses_have_leapt():
    watch = RunWatch([record(i, [0.5]) for i in range(5)], 5, 3)
    for round in range(5, 14):
        assert not watch.run_is_lost
        watch.judge(record(round, [9.0]), SOUND)
    assert watch.run_is_lost and watch.proven == 4


@pytest.mark.parametrize("seed", range(20))
def test_a_resumed_run_judges_as_one_that_was_not_interrupted(tmp_path, seed):
    draw = random.Random(seed)
    path, live, cut = tmp_path / "rounds.jsonl", RunWatch([], 0, 3), draw.randrange(2, 2 * PAST_ROUNDS)
    resumed = None
    for round in range(2 * PAST_ROUNDS + 20):
        if round == cut:
            resumed = RunWatch.over(path, round, 3)
        losses = [draw.choice([draw.uniform(0, 8 - round / 20), draw.uniform(2, 20), None]) for _ in range(2)]
        refused = [(0, draw.choice([NOT_FINITE, "other"]))] if draw.random() < 0.4 else ()
        line = record(round, losses, refused)
        mark = live.judge(line, SOUND)
        if resumed is not None:
            assert resumed.judge(line, SOUND) == mark
            assert (resumed.run_is_lost, resumed.proven) == (live.run_is_lost, live.proven)
        append_round(path, line | mark)
    assert len(read_records(path)) == 2 * PAST_ROUNDS + 20


def test_the_end_of_a_ledger_takes_the_time_of_what_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr("fslora_hf.storage.ledger._TAIL", 16)
    path, line = tmp_path / "rounds.jsonl", {"losses": [1.0] * 2000}
    path.write_text("".join(json.dumps(line | {"round": round}) + "\n" for round in range(60)))
    began = time.process_time()
    assert [record["round"] for record in last_records(path, 50)] == list(range(10, 60))
    assert time.process_time() - began < 1.5  # more, if what was read is copied for each block


# ---- Scripts and federations ----


def test_a_script_ends_with_the_sentence_and_exit_code_1(tmp_path, monkeypatch, capsys):
    source = federated.write_model_and_rows(tmp_path)
    model = tiny.base_model()
    model.lm_head.weight.data[0] = math.nan
    model.save_pretrained(source / "model")
    recipe = federated.write_recipe(source, tmp_path, save_rounds=1)
    monkeypatch.setattr(sys, "argv", ["train.py", "--config", str(recipe)])
    with pytest.raises(SystemExit, match="^Expected a run that learns, found 3 rounds in a row [^\n]*given up.$"):
        train.main()
    assert not (tmp_path / "run" / "rounds.png").exists() and last_checkpoint(tmp_path / "run") is not None
    assert not (tmp_path / "run" / "adapter_model.safetensors").exists()


def test_the_quickstart_ends_so_too(tmp_path, monkeypatch):
    class Trainer:
        def train(self):
            raise RunLost("Expected a run that learns.")

    for name, stand_in in {"build_trainer": Trainer, "held_out_rows": None, "evaluate": None}.items():
        monkeypatch.setattr(quickstart, name, lambda *args, made=stand_in: made and made())
    monkeypatch.setattr(sys, "argv", ["quickstart.py", "--output_dir", str(tmp_path / "run"), "--use_cpu", "true"])
    with pytest.raises(SystemExit, match="^Expected a run that learns.$"):
        quickstart.main()


def test_a_federation_whose_adapter_is_spoiled_ends_with_a_good_checkpoint(tmp_path, monkeypatch):
    source = federated.write_model_and_rows(tmp_path)
    recipe = federated.write_recipe(source, tmp_path, num_rounds=8, save_rounds=1, save_total_limit=1)
    nodes = federated.make_nodes(tmp_path)

    whole = RoundCallback.aggregate

    def aggregate(callback):
        record = whole(callback)
        for node in nodes.values() if record["round"] == 2 else ():
            huge(node.__self__._trainer)
        return record

    monkeypatch.setattr(RoundCallback, "aggregate", aggregate)
    with pytest.raises(RunLost) as error:
        federated.federate(recipe, federated.LocalExchange(nodes))
    good = tmp_path / "run" / "checkpoint-2"
    assert f"with resume=true in --run-config, once the checkpoints after {good} are moved away, or" in str(
        error.value
    )
    assert json.loads((good / "federated_state.json").read_text())["round"] == 2
    assert rounds_saved(tmp_path / "run") == [2, 6]
