"""A comparison that is killed, its run with it, and started again: the end is that of an uninterrupted run."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from fslora_hf import FederatedSketchConfig
from fslora_hf.config.recipe import ModelArguments, RecipeArguments, parse_recipe
from fslora_hf.launch import build_trainer
from recipes import compare
from tests.support import compared
from tests.support.evaluated import ROOT

pytest_plugins = ("tests.support.evaluated",)

ROUNDS = 24
CHANGES = {"save_rounds": 4, "lora_dropout": 0.1, "max_length": 512, "activation_checkpointing": False}
CHANGES |= {"lora_target_modules": ["q_proj", "v_proj"], "learning_rate": 0.05, "eval_rows_per_task": 12}


def start(arguments: list[str]) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "recipes/compare.py"), *arguments]
    return subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True)


def ledger(folder: Path) -> list[dict]:
    path = folder / "rounds.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    return [{key: value for key, value in json.loads(line).items() if key != "seconds"} for line in lines]


def kill_at(process: subprocess.Popen, folder: Path, rounds: int) -> int:
    """Kill a comparison and what it has started as soon as the ledger holds so many rounds; returns how many."""
    deadline = time.monotonic() + 240
    path = folder / "rounds.jsonl"
    while not path.is_file() or path.read_text().count("\n") < rounds:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return path.read_text().count("\n")


@pytest.mark.slow
def test_a_killed_comparison_goes_on_where_it_stopped(base, tmp_path, monkeypatch, capsys):
    recipe = CHANGES | {"model_name_or_path": base}
    arguments = compared.write_comparison(
        tmp_path, recipe, methods=["fslora"], seeds=[1], rounds=ROUNDS, eval_every=ROUNDS // 2
    )
    folder = tmp_path / "out" / "runs" / "fslora-seed1"
    assert 10 <= kill_at(start(arguments), folder, 10) < ROUNDS
    monkeypatch.setattr(sys, "argv", ["compare.py", *arguments])
    compare.main()
    assert "fslora-seed1: goes on" in capsys.readouterr().err

    settings = yaml.safe_load((tmp_path / "out" / "recipes" / "fslora-seed1.yaml").read_text())
    alone = tmp_path / "alone.yaml"
    alone.write_text(yaml.safe_dump(settings | {"output_dir": str(tmp_path / "alone")}))
    types = RecipeArguments, FederatedSketchConfig, ModelArguments
    trainer = build_trainer(*parse_recipe(types, ["--config", str(alone)]))
    trainer.train()
    assert ledger(folder) == ledger(tmp_path / "alone") and len(ledger(folder)) == ROUNDS
    name = f"checkpoint-{trainer.state.global_step}/adapter_model.safetensors"
    killed, whole = load_file(folder / name), load_file(tmp_path / "alone" / name)
    assert killed.keys() == whole.keys() and all(killed[key].equal(whole[key]) for key in whole)

    summary = json.loads((tmp_path / "out" / "comparison.json").read_text())
    losses = {round(row["epoch"]): row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row}
    points = summary["variants"][0]["runs"][0]["points"]
    assert {point["round"]: point["loss"] for point in points} == losses and set(losses) == {ROUNDS // 2, ROUNDS}
    sent = sum(record["bytes_up"] for record in ledger(folder))
    assert points[-1]["bytes_up"] == sent > 0 and points[-1]["accuracy"] is not None
    assert (tmp_path / "out" / "index.html").is_file() and (tmp_path / "out" / "accuracy_by_rank.png").is_file()
