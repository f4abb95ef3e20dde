"""A base model and a run of two rounds that is evaluated after each, for the tests of evaluation to share."""

import os
import subprocess
from pathlib import Path

import pytest
import torch

from fslora_hf import FederatedSketchConfig
from fslora_hf.config.recipe import ModelArguments, RecipeArguments, parse_recipe
from fslora_hf.evaluation.subjects import EvaluationArguments
from fslora_hf.launch import build_trainer
from tests.evaluation.test_loglikelihood import fitted, tokenizer
from tests.support import tiny

ROOT = Path(__file__).parents[2]
KINDS = (RecipeArguments, FederatedSketchConfig, ModelArguments, EvaluationArguments)


@pytest.fixture(scope="session")
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
    given += " --lora_dropout 0"  # which numbers it draws depends on the processes
    return [*given.split(), *more]


@pytest.fixture(scope="session")
def run(base, tmp_path_factory) -> Path:
    """A run of two rounds with an evaluation after each."""
    return train(base, tmp_path_factory.mktemp("runs") / "mine")


def train(base: str, output: Path, *more: str) -> Path:
    parsed = parse_recipe(KINDS[:3], recipe(base, output, "--eval_rounds", "1", "--disable_tqdm", "true", *more))
    trainer = build_trainer(*parsed)
    trainer.train()
    trainer.save_model(str(output))
    return output


def started(command: list[str]) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)


def accuracies(result: dict) -> dict[str, float]:
    return {line["task"]: line["value"] for line in result["scores"] if line["metric"] == "accuracy"}
