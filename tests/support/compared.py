"""Made-up runs of a comparison: what real ones leave in their folders, written in no time.

The library is imported where it is needed, because this file also stands in for the training script.
"""

import json
import sys
from pathlib import Path

import yaml

RECIPE = {
    "model_name_or_path": "some/model",
    "dtype": "float32",
    "use_cpu": True,
    "bf16": False,
    "tasks": ["boolq", "piqa"],
    "train_rows_per_task": 24,
    "eval_rows_per_task": 12,
    "lora_r": 4,
    "num_clients": 3,
    "partition": "iid",
    "local_steps": 1,
    "lr_scheduler_type": "constant",
    "output_dir": "unused",
}
COMPARISON = {"recipe": "recipe.yaml", "methods": ["fslora", "hetlora"], "seeds": [1, 2], "rounds": 4, "eval_every": 2}


def write_comparison(folder: Path, recipe: dict | None = None, **changes) -> list[str]:
    """A recipe and a comparison over it in `folder`; returns the arguments that name them, output in `folder`/out."""
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE | (recipe or {})))
    file = folder / "mine.yaml"
    values = {name: value for name, value in (COMPARISON | changes).items() if value is not None}
    file.write_text(yaml.safe_dump(values, sort_keys=False))
    return ["--config", str(file), "--output_dir", str(folder / "out")]


def record(round: int, **changes) -> dict:
    """A round of two clients of ranks 1 and 3 that sent 1 MB."""
    values = {"round": round, "clients": [0, 1], "ranks": [1, 3], "weights": [0.5, 0.5], "losses": [2.0, 1.0]}
    values |= {"update_norms": [1.0, 1.0], "refused": [], "bytes_down": 2_000_000, "bytes_up": 1_000_000}
    return values | {"bytes_full_rank": 8_000_000, "seconds": 3.0} | changes


def write_run(folder: Path, rounds: int, evaluations: dict[int, tuple], *, data: str = "d1", **scoring) -> None:
    """A run of `rounds` rounds; `evaluations` maps rounds to (loss, accuracy), without a result file for None."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "federated_run.json").write_text(json.dumps({"model": "Tiny", "data": data}))
    (folder / "rounds.jsonl").write_text("".join(json.dumps(record(i)) + "\n" for i in range(rounds)))
    checkpoint = folder / f"checkpoint-{rounds}"
    checkpoint.mkdir(exist_ok=True)
    (checkpoint / "federated_state.json").write_text(
        json.dumps({"format": 1, "round": rounds, "files": {}, "run": {}})
    )
    (folder / "rounds.png").touch()
    history = []
    for done, (loss, accuracy) in evaluations.items():
        scores = {} if accuracy is None else {"eval_accuracy": accuracy}
        history.append({"epoch": float(done), "eval_loss": loss, **scores})
        if accuracy is not None:
            _write_result(folder, done, accuracy, scoring)
    (checkpoint / "trainer_state.json").write_text(json.dumps({"log_history": [{"epoch": 1.0}, *history]}))


def _write_result(folder: Path, done: int, accuracy: float, scoring: dict) -> None:
    line = {"task": "average", "metric": "accuracy", "value": accuracy, "majority_rate": 0.4}
    values = {"protocol": "loglikelihood", "settings": {}, "prompt_hash": "p", "rows_hash": "r", "scores": [line]}
    values |= {"model": {"name": "some/model", "dtype": "float32", "quantization": None, "digest": "x"}} | scoring
    (folder / "eval_rounds").mkdir(exist_ok=True)
    (folder / "eval_rounds" / f"round-{done:04d}.loglikelihood.results.json").write_text(json.dumps(values))


def check_comparison(file: Path) -> None:
    """A file of recipes/comparisons: where it comes from, and that each of its runs would be accepted."""
    from fslora_hf.comparison.arguments import parse_comparison
    from fslora_hf.comparison.runs import runs_of

    lines = file.read_text().splitlines()
    assert lines[0].startswith("# The paper's") and lines[1].startswith("#")
    comparison = parse_comparison(["--config", str(file)])
    variants, runs = runs_of(comparison)
    assert len(runs) == len(variants) * len(comparison.seeds) and len(comparison.seeds) >= 2
    assert sum(variant.reference is not None for variant in variants) >= 1
    assert comparison.output_dir == Path("outputs") / file.stem
    assert Path(comparison.arguments.accelerate_config).is_file()


def pretend_to_train(args: list[str]) -> None:
    """In place of recipes/train.py: all rounds at once; the run of a recipe whose weight_decay is 0.5 fails."""
    settings = yaml.safe_load(Path(args[args.index("--config") + 1]).read_text())
    print("training", settings["output_dir"], *args[2:])
    if settings.get("weight_decay") == 0.5:
        sys.exit("no memory left")
    rounds = settings["num_rounds"]
    data = f"{settings['seed']}-{settings['num_clients']}"
    write_run(Path(settings["output_dir"]), rounds, {rounds: (1.5, 0.5)}, data=data)


if __name__ == "__main__":
    pretend_to_train(sys.argv[1:])
