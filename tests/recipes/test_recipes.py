"""Every recipe file, and the scripts that run them, with tiny stand-in weights of the same architecture."""

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import throughput  # recipes/benchmarks/throughput.py
from transformers import AutoModelForCausalLM, LlamaConfig, TrainerCallback

from fslora_hf import FederatedSketchConfig
from fslora_hf.config.recipe import ModelArguments, RecipeArguments, parse_recipe
from fslora_hf.data.commonsense import TASKS
from fslora_hf.data.miniature import miniature_rows
from fslora_hf.data.sources import load_rows
from fslora_hf.evaluation import Losses, Scores, TaskScore
from fslora_hf.launch import build_trainer
from fslora_hf.reports.ledger import read_ledger
from recipes.quickstart import results_table
from tests.support import tiny

pytest_plugins = ("tests.support.forked",)

ROOT = Path(__file__).parents[2]
OTHERS = {"accelerate_configs", "lm_eval", "comparisons"}  # files of other programs, and comparisons of recipes
RECIPES = sorted(path for path in (ROOT / "recipes").glob("*/**/*.yaml") if not OTHERS & set(path.parts))
BASE = {
    # What each recipe's own model has: grouped queries and, in these sizes, tied embeddings.
    "smollm2_135m": dict(num_attention_heads=3, num_key_value_heads=1, hidden_size=24),
    "llama3.2_3b": dict(num_attention_heads=3, num_key_value_heads=1, hidden_size=96, head_dim=32),
}


class StopAfterFirstRound(TrainerCallback):
    def on_epoch_end(self, args, state, control, **kwargs):
        control.should_training_stop = True


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory) -> str:
    """Generated rows as files in the published layout."""
    folder = tmp_path_factory.mktemp("commonsense")
    for task in TASKS:
        (folder / task).mkdir()
        for split in ("train", "test"):
            rows = miniature_rows(task, split, 72 if split == "train" else 12, seed=0)
            (folder / task / f"{split}.json").write_text(json.dumps(rows))
    return str(folder)


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory):
    """Path of a tiny model of a recipe folder's architecture."""

    def make(family: str) -> str:
        folder = tmp_path_factory.mktemp(family)
        config = LlamaConfig(
            **BASE[family],
            vocab_size=len(tiny.VOCABULARY),
            intermediate_size=64,
            num_hidden_layers=2,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            pad_token_id=0,
            eos_token_id=1,
            bos_token_id=None,
        )
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        tiny.tokenizer().save_pretrained(folder)
        return str(folder)

    return make


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.relative_to(ROOT / "recipes").as_posix())
def test_takes_its_first_round(path, stand_in, data_dir, tmp_path):
    model = stand_in(path.relative_to(ROOT / "recipes").parts[0])
    given = ["--config", str(path), "--model_name_or_path", model, "--output_dir", str(tmp_path / "run")]
    given += ["--data_dir", data_dir, "--use_cpu", "true", "--local_steps", "2", "--disable_tqdm", "true"]
    recipe, args, model_args = parse_recipe((RecipeArguments, FederatedSketchConfig, ModelArguments), given)
    trainer = build_trainer(recipe, args, model_args, callbacks=[StopAfterFirstRound()])
    trainer.train()
    (record,) = read_ledger(trainer.ledger_path)
    assert len(record["clients"]) == trainer.cohort_size and not record["refused"]
    assert all(norm > 0 for norm in record["update_norms"])


def launch(*command: str, cwd: Path = ROOT) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]
        + [str(ROOT / "recipes/accelerate_configs/cpu.yaml"), *command],
        capture_output=True,
        text=True,
        env=environment,
        cwd=cwd,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_train_script_runs_and_resumes(stand_in, run_script, tmp_path):
    """The command of the README, stopped after some rounds and taken up again."""
    model, output = stand_in("smollm2_135m"), tmp_path / "run"
    command = [str(ROOT / "recipes/train.py"), "--config", str(ROOT / "recipes/smollm2_135m/quickstart.yaml")]
    command += ["--model_name_or_path", model, "--output_dir", str(output), "--local_steps", "1", "--save_rounds", "1"]
    command += ["--train_rows_per_task", "24", "--lr_scheduler_type", "constant", "--save_total_limit", "9"]
    assert "Adapter, ledger and figure" in launch(*command, "--num_rounds", "2")
    assert [record["round"] for record in read_ledger(output / "rounds.jsonl")] == [0, 1]
    run_script(*command, "--num_rounds", "3", "--resume_from_checkpoint", "true")
    assert [record["round"] for record in read_ledger(output / "rounds.jsonl")] == [0, 1, 2]
    assert (output / "rounds.png").stat().st_size > 10_000
    assert (output / "adapter_model.safetensors").exists()


@pytest.mark.slow
def test_quickstart_script_reports_before_and_after(stand_in, run_script, tmp_path):
    command = [str(ROOT / "recipes/quickstart.py"), "--model_name_or_path", stand_in("smollm2_135m")]
    command += ["--num_rounds", "2", "--local_steps", "1", "--train_rows_per_task", "24", "--eval_rows_per_task", "12"]
    printed = run_script(*command, "--output_dir", str(tmp_path / "run"))
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert set(results["before"]["tasks"]) == set(TASKS) == set(results["after"]["tasks"])
    for task, score in results["after"]["tasks"].items():
        assert score["majority_rate"] > 0 and task in printed
    assert f"{results['moved']['ratio']:.0%} of what full-rank LoRA" in printed
    # A second run beside it, never over it.
    run_script(*command, "--output_dir", str(tmp_path / "run"))
    assert (tmp_path / "run-2" / "results.json").exists()


def test_train_script_tells_every_problem_at_once(run_python, tmp_path):
    recipe = tmp_path / "bad.yaml"
    recipe.write_text("model_name_or_path: x\nlocal_stepz: 3\nnum_rounds: 0\npacking: true\n")
    done = run_python(str(ROOT / "recipes/train.py"), "--config", str(recipe))
    assert done.returncode != 0 and "Traceback" not in done.stderr
    for problem in ("local_stepz", "did you mean local_steps", "num_rounds", "packing"):
        assert problem in done.stderr


def test_an_improvement_is_claimed_only_above_the_majority_rate():
    """BoolQ rising from 35 % to its majority rate of 62 % is no skill."""

    def evaluated(**accuracies: float) -> tuple[Losses, Scores]:
        tasks = {
            task: asdict(TaskScore(accuracy, 0.01, majority_rate=rate, format_validity=1.0, rows=100, invalid=0))
            for (task, accuracy), rate in zip(accuracies.items(), (0.62, 0.25, 0.25), strict=True)
        }
        metrics = {"accuracy": {"tasks": tasks}}
        return Losses(1.0, dict.fromkeys(tasks, 1.0), 100), Scores("loglikelihood", [], metrics)

    before, after = evaluated(boolq=0.35, piqa=0.25, arc=0.40), evaluated(boolq=0.622, piqa=0.40, arc=0.39)
    verdicts = [line.split()[-1] for line in results_table(before, after).splitlines()[1:4]]
    assert verdicts == ["no", "yes", "no"]


def test_rows_of_any_data_set_with_its_held_out_split(tmp_path):
    for split, rows in (("train", 6), ("validation", 2)):
        lines = [json.dumps({"prompt": "w1 ", "completion": f"w{i} "}) for i in range(rows)]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(lines))
    assert len(load_rows(str(tmp_path), "train")) == 6
    assert len(load_rows(str(tmp_path), "test")) == 2


@pytest.mark.slow
def test_throughput_benchmark_measures_every_variant(stand_in, tmp_path, monkeypatch, forked_measurements):
    output = tmp_path / "out" / "throughput.json"
    command = ["throughput.py", "--model", stand_in("smollm2_135m")]
    command += ["--cpu", "--batch_size", "1", "--length", "12", "--completion", "3", "--clients", "2"]
    command += ["--steps", "1", "--repeats", "1", "--rank", "2", "--losses", "completion", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", command)
    throughput.main()
    result = json.loads(output.read_text())
    assert set(result["results"]) == {"completions"} and "torch" in result["versions"]
    for rows in result["results"].values():
        assert set(rows) == {"sft", "one", "sft_block", "block"}
        assert all(row["tokens_per_second"] > 0 and row["peak_gigabytes"] > 0 for row in rows.values())
    assert output.with_suffix(".png").stat().st_size > 5_000
