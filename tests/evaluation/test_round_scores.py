"""Rounds are scored in the training loop: on the global adapter, by any number of processes, without a trace."""

import json
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from trl import get_peft_config

from fslora_hf import FederatedSketchConfig, FederatedSketchTrainer
from fslora_hf.config.recipe import RecipeArguments, parse_recipe
from fslora_hf.data import load_miniature
from fslora_hf.data.partition import partition
from fslora_hf.evaluation import score_rows
from fslora_hf.launch import build_trainer, held_out_rows
from tests.evaluation.test_loglikelihood import tokenizer
from tests.support.evaluated import KINDS, ROOT, accuracies, recipe

pytest_plugins = ("tests.support.evaluated", "tests.support.forked")


def test_rounds_are_scored_in_the_loop_on_the_global_adapter(run, base):
    history = json.loads((run / "checkpoint-6" / "trainer_state.json").read_text())["log_history"]
    logged = [row for row in history if "eval_accuracy" in row]
    assert [row["epoch"] for row in logged] == [1.0, 2.0]
    rows = held_out_rows(RecipeArguments(tasks=["boolq", "piqa"], eval_rows_per_task=12, num_clients=3), 42)
    for round, checkpoint, row in zip((1, 2), ("checkpoint-3", "checkpoint-6"), logged, strict=True):
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), run / checkpoint)
        scores = score_rows(model, tokenizer(), rows)
        found = json.loads((run / "eval_rounds" / f"round-{round:04d}.loglikelihood.results.json").read_text())
        assert found["scores"] == scores.table() and found["adapter"]["round"] == round
        assert row["eval_accuracy"] == scores.metrics["accuracy"]["accuracy"] == accuracies(found)["average"]
        assert row["eval_accuracy_boolq"] == scores.tasks["boolq"].accuracy
        lines = (run / "eval_rounds" / found["outcomes"]).read_text().splitlines()
        for line, outcome in zip(map(json.loads, lines), scores.outcomes, strict=True):
            torch.testing.assert_close(tuple(line["log_likelihoods"]), outcome.log_likelihoods, rtol=0, atol=1e-4)


def random_states() -> list:
    return [torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()]


def test_scoring_draws_no_random_number(base):
    model = AutoModelForCausalLM.from_pretrained(base)
    rows = held_out_rows(RecipeArguments(tasks=["boolq"], eval_rows_per_task=12, num_clients=3), 42)
    for protocol in ("loglikelihood", "generate"):
        before = random_states()
        score_rows(model, tokenizer(), rows, protocol)
        assert random_states() == before


def test_scores_do_not_depend_on_the_precision_of_training(base, tmp_path):
    """With bf16, accelerate leaves a model that computes under autocast; in the loop and after it scores are those of
    the model's own precision, which result files state."""
    given = recipe(base, tmp_path / "run", "--eval_rounds", "2", "--disable_tqdm", "true")
    given[given.index("--bf16") + 1] = "true"
    trainer = build_trainer(*parse_recipe(KINDS[:3], given))
    trainer.train()
    assert "_original_forward" in vars(trainer.model)  # what this test is about
    rows = trainer._scorer.rows[""]
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "run" / "checkpoint-6")
    fresh = [outcome.log_likelihoods for outcome in score_rows(model, tokenizer(), rows).outcomes]
    after = [outcome.log_likelihoods for outcome in score_rows(trainer.model, tokenizer(), rows).outcomes]
    lines = (tmp_path / "run" / "eval_rounds" / "round-0002.loglikelihood.outcomes.jsonl").read_text().splitlines()
    in_loop = [tuple(json.loads(line)["log_likelihoods"]) for line in lines]
    torch.testing.assert_close(torch.tensor(after), torch.tensor(fresh), rtol=0, atol=1e-4)
    torch.testing.assert_close(torch.tensor(in_loop), torch.tensor(fresh), rtol=0, atol=1e-4)


def test_scoring_in_the_loop_changes_nothing_in_training(run, base, tmp_path):
    """Bit for bit, with dropout: no number is drawn and no state is left behind."""
    ends = []
    for more in ((), ("--eval_rounds", "1"), ("--eval_rounds", "1", "--eval_protocol", "generate")):
        given = recipe(base, tmp_path / str(len(ends)), *more, "--lora_dropout", "0.3", "--eval_max_new_tokens", "2")
        trainer = build_trainer(*parse_recipe(KINDS[:3], [*given, "--disable_tqdm", "true"]))
        trainer.train()
        ends.append(load_file(tmp_path / str(len(ends)) / "checkpoint-6" / "adapter_model.safetensors"))
    for name, tensor in ends[0].items():
        assert all(torch.equal(tensor, end[name]) for end in ends[1:])


def test_several_evaluation_sets_are_scored_by_their_names(base, tmp_path):
    parsed = parse_recipe(KINDS[:3], recipe(base, tmp_path / "run", "--eval_rounds", "2", "--disable_tqdm", "true"))
    trainer = build_trainer(*parsed)
    rows = held_out_rows(parsed[0], 42)
    sets = {"few": rows.select(range(6)), "plain": rows.remove_columns(["task", "answer"])}
    again = type(trainer)(
        trainer.model.unload(),
        parsed[1],
        train_dataset=partition(load_miniature("train", ["boolq"]), "iid", 3, seed=0),
        eval_dataset=sets,
        processing_class=tokenizer(),
        peft_config=get_peft_config(parsed[2]),
    )
    again.train()
    (logged,) = [row for row in again.state.log_history if "eval_few_accuracy" in row]
    assert "eval_few_loss" in logged and not [key for key in logged if key.startswith("eval_plain_acc")]
    assert [path.name for path in (tmp_path / "run" / "eval_rounds").glob("*.json")] == [
        "round-0002.few.loglikelihood.results.json"
    ]
    # Rows that are handed in are measured by their loss alone, and after training no file is written.
    assert "eval_accuracy" not in again.evaluate(again.eval_dataset["few"])
    assert "eval_few_accuracy" in again.evaluate()
    assert len(list((tmp_path / "run" / "eval_rounds").iterdir())) == 2


def test_rows_that_cannot_be_asked_are_told_before_training(base, tmp_path):
    parsed = parse_recipe(KINDS[:3], recipe(base, tmp_path, "--disable_tqdm", "true"))
    rows = partition(held_out_rows(parsed[0], 42), "iid", 3, seed=0)
    plain = rows.map(lambda row: {"prompt": row["prompt"].replace("Answer format", "Answers")})
    model = AutoModelForCausalLM.from_pretrained(base)
    shared = {"train_dataset": rows, "processing_class": tokenizer(), "peft_config": get_peft_config(parsed[2])}

    def build(eval_dataset, **fields):
        args = replace(parsed[1], output_dir=str(tmp_path), eval_rounds=1, **fields)
        return FederatedSketchTrainer(model, args, eval_dataset=eval_dataset, **shared)

    assert build(plain)._scorer.rows == {}  # measured by their loss alone
    with pytest.raises(ValueError, match=r"^Row 0 \(from 0\) cannot be asked. Expected an instruction that ends in"):
        build(plain, eval_protocol="generate")
    model.config.max_position_embeddings = 64
    with pytest.raises(ValueError, match="^Expected rows of at most 64 tokens, found"):
        build(rows)
    model.config.max_position_embeddings = 512
    with pytest.raises(ValueError, match="^Expected evaluation sets whose names differ in letters and digits, found"):
        build({"a/b": rows, "a b": rows})


@pytest.mark.slow
def test_rounds_are_scored_in_the_loop_of_two_processes(run, base, run_python, tmp_path):
    command = [str(ROOT / "recipes/train.py"), *recipe(base, tmp_path / "mine", "--eval_rounds", "1")]
    done = run_python(*command, processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    for name in ("round-0001.loglikelihood.results.json", "round-0002.loglikelihood.results.json"):
        one, two = (json.loads((folder / "eval_rounds" / name).read_text()) for folder in (run, tmp_path / "mine"))
        assert one["scores"] == two["scores"] and (one["processes"], two["processes"]) == (1, 2)
        assert one["model"]["digest"] == two["model"]["digest"]


def test_results_of_rounds_that_are_trained_again_are_set_aside(base, tmp_path):
    given = recipe(base, tmp_path / "run", "--eval_rounds", "1", "--disable_tqdm", "true")
    build_trainer(*parse_recipe(KINDS[:3], given)).train()
    shorter = build_trainer(*parse_recipe(KINDS[:3], [*given, "--num_rounds", "1"]))
    with pytest.raises(ValueError, match="^Expected an output_dir without a run, found rounds.jsonl, checkpoint-3"):
        shorter.train()
    again = build_trainer(*parse_recipe(KINDS[:3], given))
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    folder = tmp_path / "run" / "eval_rounds"
    assert (folder / "round-0002.loglikelihood.results.json.superseded").is_file()
    assert (folder / "round-0002.loglikelihood.outcomes.jsonl.superseded").is_file()
    assert sorted(path.name for path in folder.glob("*.results.json")) == [
        f"round-000{n}.loglikelihood.results.json" for n in (1, 2)
    ]


def test_a_protocol_needs_rows_with_options(base, tmp_path):
    recipe_arguments, args, model_args = parse_recipe(KINDS[:3], recipe(base, tmp_path, "--eval_protocol", "generate"))
    rows = held_out_rows(recipe_arguments, 42).remove_columns("answer")
    with pytest.raises(
        ValueError, match="Expected eval_dataset to have the columns prompt, completion, task, answer "
    ):
        FederatedSketchTrainer("unused", args, train_dataset=rows, eval_dataset=rows)
    with pytest.raises(ValueError, match="Expected eval_protocol to be one of loglikelihood, generate, loss, found"):
        FederatedSketchConfig(output_dir=str(tmp_path), eval_protocol="loglikelyhood")


def test_a_prediction_is_not_scored(base, tmp_path):
    """Evaluation and prediction share a loop of the Trainer; what the first asks must not stick to the second."""
    trainer = build_trainer(*parse_recipe(KINDS[:3], recipe(base, tmp_path / "run", "--disable_tqdm", "true")))
    assert "eval_accuracy" in trainer.evaluate()
    trainer.args.prediction_loss_only = True
    predicted = trainer.predict(trainer.eval_dataset).metrics
    assert "test_loss" in predicted and "test_accuracy" not in predicted
