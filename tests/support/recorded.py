"""Runs that an earlier version recorded: what they were trained with, for whoever records or resumes them.

Only what users may name is imported from the package, so that either version can be behind it. The base model's
weights are recorded, not drawn: normal numbers differ in their last bits from processor to processor.
"""

from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file
from transformers import TrainerCallback

from fslora_hf import FederatedSketchConfig, FederatedSketchTrainer
from tests.support import tiny
from tests.support.hub_calls import WRITES

RECORDED = Path(__file__).parents[1] / "recorded"
MODEL = RECORDED / "model"
REPOSITORY = "user/recorded"
ROUNDS, COHORT, LOCAL_STEPS = 4, 3, 2

# Without dropout, whose numbers differ from one kind of processor to another.
_COMMON = {
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "disable_tqdm": True,
    "logging_steps": 1000,
    "activation_checkpointing": False,
    "per_device_train_batch_size": 2,
    "per_device_train_clients": 2,  # blocks of two and one
    "learning_rate": 1e-2,
    "lr_scheduler_type": "cosine",
    "num_rounds": ROUNDS,
    "clients_per_round": COHORT,
    "local_steps": LOCAL_STEPS,
    "client_ranks": [1, 2, 4, 6, 3],
    "save_rounds": 2,
    "seed": 11,
}
RUNS = {
    # The server's optimizer, what clients left out, the best round so far, and a client's own step size.
    "sketches": {
        "server_optim": "adam",
        "upload_top_k": 0.3,
        "error_feedback": True,
        "eval_rounds": 1,
        "metric_for_best_model": "loss",
        "client_weighting": "num_examples",
    },
    "folded": {"method": "flora"},  # a changed base
    "pushed": {
        "server_optim": "adamw",
        "push_to_hub": True,
        "push_rounds": 1,
        "push_resume_state": True,
        "hub_model_id": REPOSITORY,
        "hub_token": WRITES,
        "hub_deadline": 20.0,
    },
}
WAVES = 2  # of a cohort of three in blocks of two
STEPS = WAVES * LOCAL_STEPS  # optimizer steps of a round


def build(
    name: str, output_dir: str | Path, callbacks: list[TrainerCallback] = (), **changes
) -> FederatedSketchTrainer:
    """A trainer of one of `RUNS`, from its beginning, in float64."""
    model = tiny.base_model(torch.float64)
    model.load_state_dict(load_file(MODEL / "model.safetensors"))
    settings = _COMMON | RUNS[name] | changes
    return FederatedSketchTrainer(
        model=model,
        args=FederatedSketchConfig(output_dir=str(output_dir), **settings),
        train_dataset=tiny.tokenised(),
        eval_dataset=tiny.tokenised(seed=5) if "eval_rounds" in settings else None,
        processing_class=tiny.tokenizer(),
        peft_config=tiny.lora_config(),
        callbacks=list(callbacks),
    )


# ---- a federation, a comparison and evaluations, started in the folder where they lie: paths are relative ----

FEDERATION = {
    "server_optim": "adam",
    "upload_top_k": 0.3,
    "error_feedback": True,
    "num_rounds": 3,
    "clients_per_round": 3,
    "save_rounds": 1,
    "seed": 11,
}
COMPARISON = {
    "recipe": {
        "model_name_or_path": "bytes",
        "dtype": "float32",
        "use_cpu": True,
        "bf16": False,
        "tasks": ["boolq", "piqa"],
        "train_rows_per_task": 12,
        "eval_rows_per_task": 6,
        "max_length": 512,
        "lora_r": 4,
        "lora_target_modules": ["q_proj", "v_proj"],
        "lora_dropout": 0.0,
        "num_clients": 3,
        "client_ranks": [1, 2, 4],
        "partition": "iid",
        "local_steps": 1,
        "learning_rate": 0.05,
        "activation_checkpointing": False,
        "disable_tqdm": True,
        "output_dir": "unused",
    },
    "comparison": {
        "recipe": "recipe.yaml",
        "methods": ["fslora", "hetlora"],
        "seeds": [1],
        "rounds": 2,
        "eval_every": 1,
        "output_dir": "compared",
    },
}
EVALUATED = ["--adapter", "compared/runs/fslora-seed1", "--results_dir", "evaluated", "--seed", "1"]


def write_files(folder: Path, **files: dict) -> None:
    """Each as YAML, under its name."""
    for name, values in files.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
