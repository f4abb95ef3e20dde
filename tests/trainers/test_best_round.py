"""EarlyStoppingCallback and load_best_model_at_end, as users of SFTTrainer know them, at round ends.

Evaluations are scripted: their loss is a function of the rounds done, so that every test knows which round is best.
"""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import EarlyStoppingCallback, TrainerCallback
from trl import SFTConfig, SFTTrainer

from fslora_hf import FederatedSketchConfig, FederatedSketchTrainer
from fslora_hf.launch import finish
from fslora_hf.storage.checkpoint import read_state
from tests.support import federated, reference, tiny
from tests.support.worker_train import QUIET, SMALL, ledger, load_result

pytest_plugins = ("tests.support.forked",)

RUN = {**QUIET, **SMALL, "num_rounds": 5, "local_steps": 1, "clients_per_round": 2, "eval_rounds": 1}
BEST = {"load_best_model_at_end": True}
LOSSES = [3.0, 1.0, 2.0, 4.0, 0.5]  # after each round


class Scripted(FederatedSketchTrainer):
    losses = LOSSES

    def evaluation_loop(self, *args, **kwargs):
        output = super().evaluation_loop(*args, **kwargs)
        output.metrics["eval_loss"] = self.losses[self.rounds_done - 1]
        return output


class Interrupted(Exception):
    pass


class InterruptIn(TrainerCallback):
    """Ends a run in the first step of a round, as a kill would, with what is on disk then."""

    def __init__(self, round: int):
        self.round = round

    def on_epoch_begin(self, args, state, control, **kwargs):
        if state.epoch == self.round:
            raise Interrupted


def make(folder, *callbacks, losses=LOSSES, eval_rows=None, **args) -> FederatedSketchTrainer:
    trainer = Scripted(
        model=args.pop("model", None) or tiny.base_model(),
        args=FederatedSketchConfig(output_dir=str(folder), **{**RUN, **args}),
        train_dataset=tiny.tokenised(),
        eval_dataset=tiny.tokenised(seed=5).select(range(4)) if eval_rows is None else eval_rows,
        processing_class=tiny.tokenizer(),
        peft_config=tiny.lora_config(),
        callbacks=list(callbacks),
    )
    trainer.losses = losses
    return trainer


def learned(trainer) -> dict[str, torch.Tensor]:
    return {str(number): tensor.clone() for number, tensor in enumerate(trainer.learned.tensors())}


def equal(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def saved_rounds(folder) -> list[int]:
    return sorted(read_state(path)["round"] for path in folder.glob("checkpoint-*"))


@pytest.mark.parametrize("method, save_rounds", [("fslora", 0), ("fslora", 1), ("fslora", 3), ("flora", 0)])
def test_the_best_rounds_adapter_is_the_models_after_training(tmp_path, method, save_rounds):
    """With flora the base, too; with checkpoints of other rounds than those that are evaluated, or of none."""
    shared = {"method": method, "lr_scheduler_type": "constant"}
    shorter = make(tmp_path / "shorter", num_rounds=2, **shared)
    shorter.train()
    losses = [3.0, 1.0, 2.0, 4.0, 1.5]
    trainer = make(tmp_path / "run", losses=losses, save_rounds=save_rounds, **BEST, **shared)
    output = trainer.train()
    assert equal(learned(trainer), learned(shorter))
    assert [row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row] == losses  # each once
    assert output.metrics["best_round"] == 2 and trainer.state.best_metric == 1.0
    assert saved_rounds(tmp_path / "run") == {0: [1, 2], 1: [1, 2, 3, 4, 5], 3: [1, 2, 3, 5]}[save_rounds]
    assert read_state(trainer.state.best_model_checkpoint)["round"] == 2
    assert len(ledger(tmp_path / "run")) == 5
    # What a run tells and leaves names the round.
    told = "Best round of 5: 2, by eval_loss 1, whose adapter the model holds."
    assert finish(trainer).endswith(f"\n\n{told}")
    assert (tmp_path / "run" / "README.md").read_text().rstrip().endswith(f"\n\n{told}")
    name = "adapter_model.safetensors"
    final, best = (load_file(folder / name) for folder in (tmp_path / "run", tmp_path / "run" / best_folder(trainer)))
    assert equal(final, best)
    assert json.loads((tmp_path / "run" / "training_args.json").read_text())["eval_strategy"] == "no"


def best_folder(trainer) -> str:
    return f"checkpoint-{trainer.state.best_global_step}"


def test_without_load_best_model_at_end_the_last_round_stays(tmp_path):
    trainer = make(tmp_path, metric_for_best_model="loss", losses=[1.0, 2.0, 3.0, 4.0, 5.0])
    assert trainer.train().metrics["best_round"] == 1 and trainer.state.best_model_checkpoint is None
    plain = make(tmp_path / "plain")
    assert "best_round" not in plain.train().metrics
    assert equal(learned(trainer), learned(plain)) and saved_rounds(tmp_path) == []


@pytest.mark.parametrize("limit, kept", [(1, [2, 5]), (2, [2, 5]), (3, [2, 4, 5])])
def test_rotation_keeps_the_best_checkpoint(tmp_path, limit, kept):
    """As with the Trainer's own; where the latest is another, two are kept at a limit of 1."""
    trainer = make(tmp_path, losses=[3.0, 1.0, 2.0, 4.0, 1.5], save_rounds=1, save_total_limit=limit, **BEST)
    trainer.train()
    assert saved_rounds(tmp_path) == kept


def sft_evaluations(folder, losses, patience, threshold) -> int:
    """How often SFTTrainer evaluates before EarlyStoppingCallback ends it."""

    class ScriptedSFT(SFTTrainer):
        seen = 0

        def evaluation_loop(self, *args, **kwargs):
            output = super().evaluation_loop(*args, **kwargs)
            output.metrics["eval_loss"] = losses[self.seen]
            self.seen += 1
            return output

    trainer = ScriptedSFT(
        model=tiny.base_model(),
        args=SFTConfig(
            output_dir=str(folder),
            **QUIET,
            max_steps=len(losses),
            eval_strategy="steps",
            eval_steps=1,
            save_strategy="no",
            metric_for_best_model="loss",
            greater_is_better=False,
        ),
        train_dataset=tiny.tokenised().remove_columns("client_id"),
        eval_dataset=tiny.tokenised(seed=5).remove_columns("client_id").select(range(4)),
        processing_class=tiny.tokenizer(),
        peft_config=tiny.lora_config(),
        callbacks=[EarlyStoppingCallback(patience, threshold)],
    )
    trainer.train()
    return trainer.seen


@pytest.mark.parametrize(
    "losses, patience, threshold", [(LOSSES, 2, 0.0), (LOSSES, 1, 0.0), ([3.0, 2.9, 2.8, 2.7, 1.0], 2, 0.5)]
)
def test_early_stopping_ends_a_run_where_it_ends_sfttrainer(tmp_path, losses, patience, threshold):
    stop = EarlyStoppingCallback(patience, threshold)
    trainer = make(tmp_path / "run", stop, losses=losses, save_rounds=10, **BEST)
    trainer.train()
    rounds = sft_evaluations(tmp_path / "sft", losses, patience, threshold)
    assert len(ledger(tmp_path / "run")) == trainer.rounds_done == rounds < 5
    assert saved_rounds(tmp_path / "run")[-1] == rounds  # the run's last round is saved, as any run's
    assert trainer.best_told.endswith(f"EarlyStoppingCallback ended the run after {rounds} rounds.")
    # It has ended for a resumed run, too, until it is given more patience.
    end = learned(trainer)
    again = make(tmp_path / "run", EarlyStoppingCallback(patience, threshold), losses=losses, save_rounds=10, **BEST)
    again.train(resume_from_checkpoint=True)
    assert again.rounds_done == rounds and equal(learned(again), end)
    patient = make(tmp_path / "run", EarlyStoppingCallback(9, threshold), losses=losses, save_rounds=10, **BEST)
    patient.train(resume_from_checkpoint=True)
    assert patient.rounds_done == 5 and patient.best_words.startswith("5, by eval_loss")


@pytest.mark.parametrize("interrupted, block", [(1, 1), (3, 1), (2, 2), (3, 2)])
def test_a_resumed_run_has_the_same_best_round_and_patience(tmp_path, interrupted, block):
    """Killed in a round and resumed equals uninterrupted (law 3), whatever steps a round has in the layout."""
    settings = {"save_rounds": 1, "eval_on_start": False, "per_device_train_clients": 1, **BEST}
    whole = make(tmp_path / "whole", EarlyStoppingCallback(2), **settings)
    whole.train()
    assert whole.rounds_done == 4
    first = make(tmp_path / "run", EarlyStoppingCallback(2), InterruptIn(interrupted), **settings)
    with pytest.raises(Interrupted):
        first.train()
    settings |= {"per_device_train_clients": block, "eval_on_start": True}  # of the run's start, not of this one's
    again = make(tmp_path / "run", EarlyStoppingCallback(2), **settings)
    again.train(resume_from_checkpoint=True)
    assert again.best_told == whole.best_told and again.rounds_done == 4
    assert read_state(again.state.best_model_checkpoint)["round"] == 2
    if block == 1:
        assert equal(learned(again), learned(whole))
        assert again.state.best_global_step == whole.state.best_global_step
    for one, other in zip(ledger(tmp_path / "run"), ledger(tmp_path / "whole"), strict=True):
        assert one["clients"] == other["clients"]


def test_a_run_is_not_resumed_under_another_metric(tmp_path):
    make(tmp_path, save_rounds=1, num_rounds=1, **BEST).train()
    other = make(tmp_path, save_rounds=1, metric_for_best_model="entropy", **BEST)
    with pytest.raises(ValueError, match="metric_for_best_model was 'loss' and is 'entropy'"):
        other.train(resume_from_checkpoint=True)


def test_a_best_checkpoint_that_is_gone_is_told(tmp_path, caplog):
    trainer = make(tmp_path, losses=[1.0, 2.0, 3.0, 4.0, 5.0], save_rounds=1, **BEST)
    last = make(tmp_path / "last")
    last.train()

    class Remove(TrainerCallback):
        def on_epoch_begin(self, args, state, control, **kwargs):
            if state.epoch == 3:
                (tmp_path / best_folder(trainer)).rename(tmp_path / "mine")

    trainer.add_callback(Remove())
    trainer.train()
    assert "Expected the checkpoint of round 1, the best, in" in caplog.text
    assert equal(learned(trainer), learned(last)) and trainer.best_told == ""


PROBLEMS = {
    "load_best without evaluations": (
        {"eval_rounds": 0, **BEST},
        (),
        "Expected eval_rounds to be above 0 with load_best_model_at_end, found 0: set it, so that",
    ),
    "early stopping without evaluations": (
        {"eval_rounds": 0},
        (EarlyStoppingCallback,),
        "Expected eval_rounds above 0 with EarlyStoppingCallback, found 0: set it",
    ),
    "early stopping without a metric": (
        {},
        (EarlyStoppingCallback(3),),
        "Expected metric_for_best_model with EarlyStoppingCallback, found none: set it to",
    ),
    "a metric that is none": (
        {"metric_for_best_model": "eval_los"},
        (),
        "Expected metric_for_best_model to be one of loss, entropy, .*, found 'eval_los': did you mean loss",
    ),
    "a metric of one of several sets": (
        {**BEST, "eval_rows": {"a": tiny.tokenised(), "b": tiny.tokenised()}},
        (),
        "Expected metric_for_best_model to be one of a_loss, .*b_loss, .*, found 'loss': ",
    ),
}


@pytest.mark.parametrize("case", PROBLEMS)
def test_what_cannot_be_told_is_refused_before_a_model_is_loaded(tmp_path, case):
    settings, callbacks, message = PROBLEMS[case]
    with pytest.raises(ValueError, match=message):
        make(tmp_path / "run", *callbacks, model="/no/such/model", **settings)
    assert not (tmp_path / "run").exists()


def test_a_callback_that_is_added_later_is_looked_at_when_training_starts(tmp_path):
    trainer = make(tmp_path / "run", eval_rounds=0)
    trainer.add_callback(EarlyStoppingCallback())
    with pytest.raises(ValueError, match="Expected eval_rounds above 0 with EarlyStoppingCallback, found 0"):
        trainer.train()


def test_a_metric_that_an_evaluation_does_not_tell(tmp_path):
    """Rows without options have no accuracy, which shows when they are first evaluated."""
    trainer = make(tmp_path, metric_for_best_model="accuracy")
    with pytest.raises(ValueError, match="a metric of the evaluation, found 'accuracy' and the metrics .*eval_loss"):
        trainer.train()


def test_two_processes_choose_and_load_the_same_round(tmp_path, fork_ranks):
    args = {k: v for k, v in RUN.items() if k not in {*QUIET, *SMALL}} | {**BEST, "learning_rate": 3.0}
    ends = []
    for processes in (1, 2):
        job = {"output_dir": str(tmp_path / str(processes)), "args": args, "dtype": "float64"}
        job |= {"result": str(tmp_path / f"end-{processes}"), "evaluated": True, "patience": 2}
        assert fork_ranks(job, processes) == [0] * processes
        ends += [load_result(job["result"], rank) for rank in range(processes)]
        rounds = len(ledger(tmp_path / str(processes)))
        assert rounds < 5, "the run was to stop early, and not at its best round"
    assert reference.max_difference(ends[1], ends[2]) == 0
    assert reference.max_difference(ends[0], ends[1]) < 1e-9


def test_a_federation_chooses_the_simulators_best_round(tmp_path):
    """By the same loss of the held-out rows, of which only the completions are scored."""
    source = federated.write_model_and_rows(tmp_path)
    worst = {**BEST, "greater_is_better": True}  # so that it is not the last
    recipe = federated.write_recipe(source, tmp_path, eval_rounds=1, num_rounds=2, **worst)
    table = federated.federate(recipe, federated.LocalExchange(federated.make_nodes(tmp_path)))
    trainer = federated.simulate(recipe, tmp_path / "simulated")
    assert table.endswith(f"\n\n{trainer.best_told}") and trainer.best_words.startswith("1, by eval_loss 4.0")
    found, expected = (federated.saved_adapter(tmp_path / name) for name in ("run", "simulated"))
    assert reference.max_difference(found, expected) < 1e-9
