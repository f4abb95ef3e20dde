"""Evaluation of whatever a user has: in the training loop, and by recipes/evaluate.py."""

import json
import os
import random
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from trl import get_peft_config

from fslora_hf import FederatedSketchConfig, FederatedSketchTrainer
from fslora_hf.data import load_miniature
from fslora_hf.evaluation import score_rows
from fslora_hf.launch import build_trainer, held_out_rows
from fslora_hf.partition import partition
from fslora_hf.recipe import ModelArguments, RecipeArguments, parse_recipe
from fslora_hf.scoring import evaluate
from fslora_hf.subjects import EvaluationArguments, find_adapters
from tests import tiny
from tests.test_loglikelihood import fitted, tokenizer

pytest_plugins = ("tests.hub_client",)

ROOT = Path(__file__).parent.parent
KINDS = (RecipeArguments, FederatedSketchConfig, ModelArguments, EvaluationArguments)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("models") / "tiny-base"
    fitted(tiny.base_model(torch.float32)).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)


def recipe(base: str, output: Path, *more: str) -> list[str]:
    given = f"--model_name_or_path {base} --output_dir {output} --dtype float32 --use_cpu true --bf16 false"
    given += " --tasks boolq piqa --train_rows_per_task 24 --eval_rows_per_task 12 --max_length 512"
    given += " --lora_r 4 --lora_target_modules q_proj v_proj --num_clients 3 --partition iid --client_ranks 1 2 4"
    given += " --num_rounds 2 --local_steps 1 --save_rounds 1 --learning_rate 0.05 --activation_checkpointing false"
    return [*given.split(), *more]


@pytest.fixture(scope="module")
def run(base, tmp_path_factory) -> Path:
    """A run of two rounds with an evaluation after each."""
    output = tmp_path_factory.mktemp("runs") / "mine"
    parsed = parse_recipe(KINDS[:3], recipe(base, output, "--eval_rounds", "1", "--disable_tqdm", "true"))
    trainer = build_trainer(*parsed)
    trainer.train()
    trainer.save_model(str(output))
    return output


def results_of(base: str, output: Path, *more: str) -> tuple[list[dict], Path]:
    recipe_arguments, args, model_args, arguments = parse_recipe(KINDS, recipe(base, output, *more))
    return evaluate(arguments, args, model_args, held_out_rows(recipe_arguments, args.seed))


def started(command: list[str]) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)


def accuracies(result: dict) -> dict[str, float]:
    return {line["task"]: line["value"] for line in result["scores"] if line["metric"] == "accuracy"}


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


def test_a_whole_run_and_again_without_asking_anything_twice(run, base, monkeypatch):
    results, folder = results_of(base, run, "--adapter", str(run))
    assert folder == run / "evaluation"
    assert [result["name"] for result in results] == ["tiny-base", "mine, round 1", "mine, round 2"]
    for result, number in zip(results[1:], (1, 2), strict=True):
        in_loop = json.loads((run / "eval_rounds" / f"round-{number:04d}.loglikelihood.results.json").read_text())
        assert result["scores"] == in_loop["scores"]
        assert result["adapter"]["digest"] == in_loop["adapter"]["digest"]
        assert result["model"] == in_loop["model"] and result["rows_hash"] == in_loop["rows_hash"]
    assert not list(folder.glob(".*"))  # no journal is left
    monkeypatch.setattr("fslora_hf.scoring.score_rows", None)
    again, _ = results_of(base, run, "--adapter", str(run))
    assert [result["time"] for result in again] == [result["time"] for result in results]
    with pytest.raises(ValueError, match="^Expected the results in .* found another's: rows_hash was .* Name another"):
        results_of(base, run, "--adapter", str(run), "--seed", "3")


def test_base_adapter_and_checkpoint(run, base, tmp_path):
    whole, _ = results_of(base, run, "--adapter", str(run), "--results_dir", str(tmp_path / "run"))
    (alone,), folder = results_of(base, run, "--results_dir", str(tmp_path / "base"))
    assert alone["adapter"] is None and alone["scores"] == whole[0]["scores"]
    assert (folder / "tiny-base.loglikelihood.results.json").is_file()
    checkpoint = ("--adapter", str(run / "checkpoint-3"))
    (one,), folder = results_of(base, run, *checkpoint, "--results_dir", str(tmp_path / "one"))
    assert one["scores"] == whole[1]["scores"] and one["adapter"]["round"] == 1
    assert (folder / "mine-checkpoint-3.loglikelihood.results.json").is_file()
    both, _ = results_of(base, run, *checkpoint, "--with_base", "true", "--results_dir", str(tmp_path / "both"))
    assert [result["scores"] for result in both] == [alone["scores"], one["scores"]]
    text = ("--eval_protocol", "generate", "--eval_num_beams", "2", "--eval_max_new_tokens", "3")
    (text,), _ = results_of(base, run, *checkpoint, *text, "--results_dir", str(tmp_path))
    assert text["settings"] == {"num_beams": 2, "max_new_tokens": 3} and text["protocol"] == "generate"


def test_a_run_without_checkpoints_is_its_final_adapter(run, tmp_path):
    (found,), folder = find_adapters(str(run / "checkpoint-6"))
    assert folder is None and found.round == 2
    for name in ("adapter_config.json", "adapter_model.safetensors", "rounds.jsonl"):
        shutil.copy(run / name, tmp_path)
    (final,), folder = find_adapters(str(tmp_path))
    assert (final.label, final.round, folder) == ("final", None, tmp_path)


def _on_the_hub(arguments: list[str], run: str) -> list[dict]:
    results, _ = results_of(arguments[0], Path(run), "--adapter", arguments[1], "--results_dir", arguments[2])
    return results


def _complaint(arguments: list[str], run: str) -> str:
    try:
        _on_the_hub(arguments, run)
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.slow
def test_a_round_of_a_hub_repository(run, base, hub, on_client, tmp_path):
    files = {}
    for round, checkpoint in ((1, "checkpoint-3"), (2, "checkpoint-6")):
        files = {path.name: path.read_bytes() for path in (run / checkpoint).iterdir() if path.is_file()}
        sha = hub.add("ann/adapter", {**files, "evil.py": b"raise SystemExit"}, tag=f"round-{round:04d}")
    (local,), _ = results_of(base, run, "--adapter", str(run / "checkpoint-3"), "--results_dir", str(tmp_path / "l"))
    (first,) = on_client(_on_the_hub, [base, "ann/adapter@round-0001", str(tmp_path / "a")], str(run))
    (latest,) = on_client(_on_the_hub, [base, "ann/adapter", str(tmp_path / "b")], str(run))
    assert first["scores"] == local["scores"] and first["adapter"]["digest"] == local["adapter"]["digest"]
    assert first["adapter"]["round"] == 1 and latest["adapter"]["round"] == 2
    assert latest["adapter"]["revision"] == sha != first["adapter"]["revision"]
    assert (tmp_path / "a" / "ann-adapter-round-0001.loglikelihood.results.json").is_file()
    assert not [request for request in hub.requests if "evil" in request.path]  # nothing that could run is fetched
    for name in ("ann/adapter@round-0009", "ann/nothing"):
        complaint = on_client(_complaint, [base, name, str(tmp_path / "c")], str(run))
        assert complaint.startswith(f"Expected the adapter {name} on the Hub, found none that can be fetched (")


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
def test_rounds_are_scored_in_the_loop_of_two_processes(run, base, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(ROOT / "recipes/train.py"), *recipe(base, tmp_path / "mine", "--eval_rounds", "1")]
    done = started(command)
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


def test_what_cannot_be_scored_is_told(run, base, tmp_path):
    def refused(adapter: str | None, model: str = base, *more: str) -> str:
        given = [] if adapter is None else ["--adapter", adapter]
        with pytest.raises(ValueError) as error:
            results_of(model, run, *given, "--results_dir", str(tmp_path / "results"), *more)
        return str(error.value)

    assert refused("no such thing").startswith("Expected adapter to be a folder or a Hub repository (owner/name or")
    (tmp_path / "empty").mkdir()
    assert "found no adapter_config.json and no adapter_model.safetensors" in refused(str(tmp_path / "empty"))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "rounds.jsonl").write_text("")
    assert refused(str(tmp_path / "run")).startswith("Expected a finished checkpoint or an adapter in the run")
    with pytest.raises(ValueError, match="Expected adapter to be a folder or a repository, found ''"):
        EvaluationArguments(adapter="")
    checkpoint = str(run / "checkpoint-3")
    other = str(tmp_path / "other-base")
    message = refused(checkpoint, other)  # told before a model is looked for: there is none of this name
    assert message.startswith(
        f"Expected the base of the adapter {checkpoint}, {base}, found model_name_or_path={other}"
    )
    wider = tiny.base_model(torch.float32)
    wider.config.hidden_size = 32
    wider = type(wider)(wider.config)
    wider.save_pretrained(other)
    tokenizer().save_pretrained(other)
    message = refused(checkpoint, other, "--allow_other_base", "true")
    assert message.startswith("Expected a base with 16 inputs in model.layers.0.self_attn.q_proj, as the adapter")
    assert message.endswith("found a layer with 32: name the base that the adapter was trained on.")


def test_a_base_of_another_kind_has_no_such_layer(base, tmp_path):
    from fslora_hf.subjects import check_base_shapes

    model = get_peft_model(tiny.base_model(torch.float32), tiny.lora_config(2))
    model.save_pretrained(tmp_path)
    (found,), _ = find_adapters(str(tmp_path))
    check_base_shapes(found, tiny.base_model())
    shallow = tiny.base_model()
    del shallow.model.layers[1]
    with pytest.raises(
        ValueError, match="in model.layers.1.* as the adapter .* has it, found no such layer: name the"
    ):
        check_base_shapes(replace(found, source="x"), shallow)


@pytest.mark.slow
def test_the_script_in_two_processes(run, base, tmp_path):
    """The command of the README with another launcher, since `accelerate launch` starts one process on a CPU."""
    expected, _ = results_of(base, run, "--adapter", str(run), "--results_dir", str(tmp_path / "one"))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(ROOT / "recipes/evaluate.py"), *recipe(base, run, "--adapter", str(run))]
    command += ["--results_dir", str(tmp_path / "two")]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for result in expected:
        (path,) = [
            path
            for path in (tmp_path / "two").glob("*.results.json")
            if json.loads(path.read_text())["name"] == result["name"]
        ]
        found = json.loads(path.read_text())
        assert found["scores"] == result["scores"] and found["processes"] == 2
        assert found["name"] in done.stdout
    assert (tmp_path / "two" / "accuracy_by_round.loglikelihood.png").stat().st_size > 10_000
    assert not list((tmp_path / "two").glob(".*"))


def test_the_script_tells_problems_in_sentences(base, tmp_path):
    command = [sys.executable, str(ROOT / "recipes/evaluate.py"), *recipe(base, tmp_path, "--adapter", "nothing here")]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("Expected adapter to be a folder or a Hub repository")
