"""Evaluations and comparisons, killed at random moments and started again, end as those that nobody killed.

FSLORA_KILLS=20 plays as many kills of each; a few are enough to see that the ends are looked at.
"""

import os

import pytest

from tests.support import compared
from tests.support.evaluated import ROOT, recipe
from tests.support.random_kills import Player, kills

pytest_plugins = ("tests.support.evaluated", "tests.support.forked")

NUMBER = int(os.environ.get("FSLORA_KILLS", "2"))
SEED = int(os.environ.get("FSLORA_KILLS_SEED", "0"))
CHANGES = {"save_rounds": 1, "lora_dropout": 0.1, "max_length": 512, "activation_checkpointing": False}
CHANGES |= {"lora_target_modules": ["q_proj", "v_proj"], "learning_rate": 0.05, "eval_rows_per_task": 12}


def test_an_evaluation_that_is_killed(run, base, server, tmp_path):
    command = [str(ROOT / "recipes/evaluate.py"), *recipe(base, run, "--adapter", str(run))]
    command += ["--results_dir", str(tmp_path / "results"), "--per_device_eval_batch_size", "1"]
    assert kills(Player(server, command, tmp_path / "results", tmp_path), NUMBER, SEED) >= NUMBER


@pytest.mark.slow
def test_a_comparison_that_is_killed(base, server, tmp_path):
    arguments = compared.write_comparison(
        tmp_path, CHANGES | {"model_name_or_path": base}, methods=["fslora", "hetlora"], seeds=[1], rounds=4
    )
    command = [str(ROOT / "recipes/compare.py"), *arguments]
    assert kills(Player(server, command, tmp_path / "out", tmp_path), NUMBER, SEED) >= NUMBER
