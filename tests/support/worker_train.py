"""One training run described by a JSON file, for tests that need a process of their own: several, or one to be killed.

`torchrun --nproc_per_node 2 tests/support/worker_train.py job.json`, or `run(job)` or `run_as(job, ...)` in processes
that the test forks. A job:

    output_dir        folder of the run
    args              fields of FederatedSketchConfig
    lora              arguments of tiny.lora_config
    dtype             "float64" or "float32"
    zeroed            name of a layer of the model whose weight is set to zero
    resume            resume from the last complete checkpoint
    evaluated         evaluate on other tiny rows
    patience          of an EarlyStoppingCallback
    result            path; this process's final global adapter is written to `<result>.<rank>.safetensors`, or what
                      train() refused to do, to `<result>.error`; how many steps it took, to `<result>.steps`
    watch             [first, last): optimizer steps of this process in which disk operations are counted, and the
                      beginning of the last; first = -1 is the moment before train()
    operations        path; the watched disk operations are written there, one a line
    album             folder; what output_dir holds at each of them is copied to `<album>/<number>/run`
    kill              {"operation": n} at the n-th of them, or at the first of that text, or
                      {"event": "on_substep_end", "step": n} in the n-th step
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import safetensors.torch
import torch
from transformers import EarlyStoppingCallback, TrainerCallback

from fslora_hf.common.processes import leave
from fslora_hf.config.federation import FederatedSketchConfig
from fslora_hf.trainers.sft import FederatedSketchTrainer
from tests.support import reference, tiny
from tests.support.disk_operations import DiskOperations

# Recomputing activations, TRL's default, only costs time here; one configuration of law 1 turns it on.
QUIET = {"use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True, "logging_steps": 1000}
QUIET["activation_checkpointing"] = False
SMALL = {"per_device_train_batch_size": 2, "learning_rate": 1e-2, "lr_scheduler_type": "constant", "save_rounds": 0}


def build(
    output_dir,
    args: dict,
    lora: dict | None = None,
    *,
    dtype=torch.float64,
    dataset=None,
    callbacks=None,
    eval_dataset=None,
    update_transforms=(),
) -> FederatedSketchTrainer:
    """A trainer on the tiny model; `args` are fields of FederatedSketchConfig beyond the defaults above."""
    return FederatedSketchTrainer(
        model=tiny.base_model(dtype),
        args=FederatedSketchConfig(output_dir=str(output_dir), **{**QUIET, **SMALL, **args}),
        train_dataset=tiny.tokenised() if dataset is None else dataset,
        eval_dataset=eval_dataset,
        processing_class=tiny.tokenizer(),
        peft_config=tiny.lora_config(**(lora or {})),
        callbacks=callbacks,
        update_transforms=update_transforms,
    )


def run(job: dict) -> None:
    disk = None
    if "watch" in job:
        disk = DiskOperations(job["output_dir"], (job.get("kill") or {}).get("operation"), job.get("album"))
    killer = Killer(job.get("kill") or {}, disk, job.get("watch"))
    trainer = build(
        job["output_dir"],
        job["args"],
        job.get("lora"),
        dtype=getattr(torch, job["dtype"]),
        callbacks=[killer, *([EarlyStoppingCallback(job["patience"])] if "patience" in job else [])],
        eval_dataset=tiny.tokenised(seed=5) if job.get("evaluated") else None,
    )
    if job.get("zeroed"):
        trainer.model.get_submodule(job["zeroed"]).weight.data.zero_()
    if disk:
        disk.armed = killer.watch[0] < 0
    try:
        trainer.train(resume_from_checkpoint=True if job.get("resume") else None)
    except ValueError as error:
        Path(f"{job['result']}.error").write_text(f"{type(error).__name__}: {error}")
        raise
    if job.get("result"):
        pairs = reference.read_adapter(trainer.model)
        halves = {
            f"{name}.{h}": half.contiguous()
            for name, pair in pairs.items()
            for h, half in zip("AB", pair, strict=True)
        }
        safetensors.torch.save_file(halves, f"{job['result']}.{os.environ.get('RANK', 0)}.safetensors")
    Path(f"{job['result']}.steps").write_text(str(killer.step))
    if job.get("operations"):
        Path(job["operations"]).write_text("".join(f"{line}\n" for line in disk.log))


def run_as(job: dict, rank: int, processes: int, port: int) -> None:
    """`run` as one of several processes, with the environment that torchrun would have given it."""
    os.environ.update(rank_variables(rank, processes, port))
    run(job)
    leave()


def rank_variables(rank: int, processes: int, port: int) -> dict[str, str]:
    """What torchrun tells a process."""
    named = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
    named |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return {name: str(value) for name, value in named.items()}


def load_result(result, rank: int = 0) -> reference.Adapter:
    halves = safetensors.torch.load_file(f"{result}.{rank}.safetensors")
    return {name[:-2]: (half, halves[f"{name[:-2]}.B"]) for name, half in halves.items() if name.endswith(".A")}


def launch(job: dict, tmp_path, processes: int = 2) -> subprocess.CompletedProcess:
    """Runs `job` in several processes, under torchrun."""
    described = tmp_path / "job.json"
    described.write_text(json.dumps(job))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    return subprocess.run([*torchrun, __file__, str(described)], capture_output=True, text=True, timeout=300)


def ledger(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]


def check_same_ledger(folder, expected_folder, beside=(), rtol=1e-9):
    """Equal but for seconds and what else is named; losses, norms and errors up to rounding."""
    rounds, expected = ledger(folder), ledger(expected_folder)
    assert len(rounds) == len(expected)
    for line, other in zip(rounds, expected, strict=True):
        if "norm_bounds" not in other:  # of a federation only
            line.pop("norm_bounds", None)
        assert line.keys() == other.keys()
        for key in {"losses", "update_norms", "weights", "truncation_error", "norm_bounds"} & line.keys():
            torch.testing.assert_close(line.pop(key), other.pop(key), rtol=rtol, atol=1e-12)
        for key in ("seconds", *beside):
            line.pop(key), other.pop(key)
        assert line == other


class Killer(TrainerCallback):
    """Counts the optimizer steps of this process; kills it inside one, or lets `disk` do so at an operation."""

    def __init__(self, kill: dict, disk: DiskOperations | None, watch: list[int] | None):
        self.kill, self.disk, self.watch, self.step = kill, disk, watch, 0

    def on_step_begin(self, *args, **kwargs):
        if self.disk and self.step == self.watch[1]:
            self.disk.happens("next round begins", self.disk.root)
            self.disk.armed = False
        elif self.disk and self.step == self.watch[0]:
            self.disk.armed = True
        self._maybe_kill("on_step_begin")

    def on_substep_end(self, *args, **kwargs):
        self._maybe_kill("on_substep_end")

    def on_pre_optimizer_step(self, *args, **kwargs):
        self._maybe_kill("on_pre_optimizer_step")

    def on_optimizer_step(self, *args, **kwargs):
        self._maybe_kill("on_optimizer_step")
        self.step += 1

    def on_train_end(self, *args, **kwargs):
        self._maybe_kill("on_train_end")

    def _maybe_kill(self, event: str) -> None:
        if self.kill.get("event") == event and self.kill["step"] == self.step and os.environ.get("RANK", "0") == "0":
            os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    run(json.loads(Path(sys.argv[1]).read_text()))
    leave()
