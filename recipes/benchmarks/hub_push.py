"""What pushing every round costs the training beside it, with a Hub that takes its time over each commit.

    python recipes/benchmarks/hub_push.py --model ~/.cache/fslora_hf/SmolLM2-135M-Instruct --cpu

The Hub is the tests' own, on this machine, and waits `--stall` seconds before it answers a commit. Every measurement
is a process of its own, and those with and without pushing take turns, so that a machine whose speed drifts drifts for
both. Measured are the wall-clock and processor seconds from the first step to the end of the last round, and within
them the seconds that the training loop itself spends on snapshots; what is pushed after the last round is not
training. Ratios are of medians. Writes JSON.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

from throughput import (  # beside this file
    PACKAGES,
    TARGETS,
    add_work_options,
    load_model,
    make_rows,
    make_tokenizer,
    processor,
)

VARIANTS = {"off": "no pushing", "on": "every round pushed"}
TOKEN = "hf_benchmark"  # of the tests' Hub
CLOCKS = (time.perf_counter, time.process_time)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_work_options(parser, batch_size=2)
    parser.add_argument("--clients", type=int, default=4, help="clients in a round")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--steps", type=int, default=4, help="local steps of a client in a round")
    parser.add_argument("--stall", type=float, default=30.0, help="seconds that the Hub waits at each commit")
    parser.add_argument("--repeats", type=int, default=3, help="processes of each variant")
    parser.add_argument("--output", default="outputs/hub_push.json")
    parser.add_argument("--worker", choices=VARIANTS, help=argparse.SUPPRESS)
    parser.set_defaults(scored="completion")
    return parser.parse_args()


def work(options: argparse.Namespace) -> None:
    """Train in this process, print what was measured when the last round is over, and leave what is still queued."""
    from peft import LoraConfig
    from transformers import TrainerCallback

    from fslora_hf import FederatedSketchConfig, FederatedSketchTrainer

    class Clock(TrainerCallback):
        def on_train_begin(self, *args, **kwargs):
            self.start = time.perf_counter(), time.process_time()

        def on_train_end(self, *args, **kwargs):
            wall, processor_time = (now() - then for now, then in zip(CLOCKS, self.start, strict=True))
            print(json.dumps({"seconds": wall, "processor_seconds": processor_time, "snapshots": snapshots}))
            sys.stdout.flush()
            os._exit(0)

    model = load_model(options)
    hub = {"push_to_hub": True, "push_rounds": 1, "hub_model_id": "user/run", "hub_token": TOKEN}
    args = FederatedSketchConfig(
        output_dir=tempfile.mkdtemp(prefix="run-", dir=os.environ["TMPDIR"]),
        use_cpu=options.cpu,
        bf16=False,
        activation_checkpointing=False,
        report_to="none",
        disable_tqdm=True,
        learning_rate=1e-4,
        max_length=None,
        lr_scheduler_type="constant",
        num_rounds=options.rounds,
        local_steps=options.steps,
        clients_per_round=options.clients,
        per_device_train_batch_size=options.batch_size,
        save_rounds=1,
        **(hub if options.worker == "on" else {}),
    )
    trainer = FederatedSketchTrainer(
        model=model,
        args=args,
        train_dataset=make_rows(options, model.config.vocab_size),
        processing_class=make_tokenizer(),
        peft_config=LoraConfig(r=options.rank, lora_alpha=options.rank, target_modules=TARGETS),
        callbacks=[Clock()],
    )
    snapshots = _timed_snapshots(trainer.publisher) if trainer.publisher else []
    trainer.train()


def _timed_snapshots(publisher) -> list[float]:
    """The seconds of every snapshot that is taken from here on."""
    seconds, publish = [], publisher.publish

    def timed(*args, **kwargs):
        start = time.perf_counter()
        publish(*args, **kwargs)
        seconds.append(time.perf_counter() - start)

    publisher.publish = timed
    return seconds


def run_worker(variant: str, url: str, folder: str) -> dict:
    environment = {**os.environ, "HF_ENDPOINT": url, "HF_HUB_DISABLE_XET": "1", "TMPDIR": folder}
    command = [sys.executable, __file__, *sys.argv[1:], "--worker", variant]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"Expected the variant {variant} to run, found:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(options: argparse.Namespace) -> dict[str, list[dict]]:
    sys.path.insert(0, str(Path(__file__).parents[2]))  # the tests' Hub is not part of the package
    from tests.hub_server import HubServer

    measured: dict[str, list[dict]] = {variant: [] for variant in VARIANTS}
    total, start = options.repeats * len(VARIANTS), time.monotonic()
    with HubServer() as hub:
        hub.upload_mode = "lfs"
        for number in range(total):
            variant = list(VARIANTS)[number % 2]
            hub.clear()
            hub.users[TOKEN] = {"name": "user", "role": "write", "orgs": []}
            hub.fault("commit", stall_s=options.stall, times=None)
            with tempfile.TemporaryDirectory() as folder:
                measured[variant].append(run_worker(variant, hub.url, folder))
            hub.mend()
            left = (time.monotonic() - start) / (number + 1) * (total - number - 1)
            text = f"{number + 1}/{total} {VARIANTS[variant]}, {left / 60:.1f} minutes left"
            print(text, file=sys.stderr, flush=True)
    return measured


def summarise(measured: dict[str, list[dict]]) -> dict:
    """Medians of each variant, and by how much pushing adds to them."""
    rows = {
        variant: {key: statistics.median(run[key] for run in runs) for key in ("seconds", "processor_seconds")}
        for variant, runs in measured.items()
    }
    in_loop = [sum(run["snapshots"]) for run in measured["on"]]
    return {
        **rows,
        "growth": rows["on"]["seconds"] / rows["off"]["seconds"] - 1,
        "processor_growth": rows["on"]["processor_seconds"] / rows["off"]["processor_seconds"] - 1,
        "snapshot_share": statistics.median(in_loop) / rows["on"]["seconds"],
        "snapshot_seconds": statistics.median(one for run in measured["on"] for one in run["snapshots"] if one > 1e-4),
        "all_seconds": {variant: [run["seconds"] for run in runs] for variant, runs in measured.items()},
    }


def main() -> None:
    options = parse()
    if options.worker:
        work(options)
        return
    summary = summarise(measure(options))
    for variant, name in VARIANTS.items():
        row = summary[variant]
        print(f"{name:20}{row['seconds']:9.1f} s{row['processor_seconds']:9.1f} processor s")
    print(f"With a Hub that waits {options.stall:g} s at each commit, training took {summary['growth']:+.1%} "
          f"({summary['processor_growth']:+.1%} of processor time); {summary['snapshot_share']:.2%} of it in the loop "
          f"itself, {summary['snapshot_seconds'] * 1000:.0f} ms a snapshot.")  # fmt: skip
    settings = {key: value for key, value in vars(options).items() if key not in ("worker", "output", "scored")}
    result = {"settings": settings | {"model": Path(options.model).name}, "results": summary}
    result["versions"] = {name: version(name) for name in PACKAGES} | {"python": platform.python_version()}
    result["hardware"] = {"device": processor()}
    output = Path(options.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"Written: {output}")


if __name__ == "__main__":
    main()
