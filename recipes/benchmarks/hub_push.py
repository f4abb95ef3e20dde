"""What pushing a round costs the training beside it, with a Hub that takes its time over each commit.

    python recipes/benchmarks/hub_push.py --model ~/.cache/fslora_hf/SmolLM2-135M-Instruct --cpu

The Hub is the tests' own, in a process of its own on this machine, and waits `--stall` seconds before it answers a
commit. One run pushes every second round, so that each round with a push under way lies between two without, of the
same process: a machine whose speed drifts drifts for all three. Measured, in wall-clock and processor seconds of the
training process, are a round's steps and checkpoint, and the snapshot that the loop itself takes of a pushed round.
The cost of a push is its snapshot, and what the round after it took beyond the mean of the two rounds beside it.
Writes JSON.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

from measurements import processor, write_result  # beside this file
from step_rows import QUIET, make_rows, make_tokenizer
from throughput import PACKAGES, TARGETS, add_work_options, load_model
from turns import run_again

TOKEN = "hf_benchmark"  # of the tests' Hub
CLOCKS = (time.perf_counter, time.process_time)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_work_options(parser, batch_size=2)
    parser.add_argument("--clients", type=int, default=2, help="clients in a round")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=17, help="rounds of the run; the first is not counted")
    parser.add_argument("--steps", type=int, default=14, help="local steps of a client in a round")
    parser.add_argument("--stall", type=float, default=30.0, help="seconds that the Hub waits at each commit")
    parser.add_argument("--output", default="outputs/hub_push.json")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.set_defaults(scored="completion")
    options = parser.parse_args()
    if options.rounds < 5:
        parser.error(f"Expected at least 5 rounds, so that one push lies between two quiet rounds, found "
                     f"{options.rounds}.")  # fmt: skip
    return options


def work(options: argparse.Namespace) -> None:
    """Train in this process, print what was measured when the last round is over, and leave what is still queued."""
    from peft import LoraConfig
    from transformers import TrainerCallback

    from fslora_hf import FederatedSketchConfig, FederatedSketchTrainer

    class Clock(TrainerCallback):
        """The clocks at the beginning of every round, and at the end of the last."""

        readings = []

        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step % (state.max_steps // options.rounds) == 0:
                self.readings.append([now() for now in CLOCKS])
                print(f"round {len(self.readings)} of {options.rounds}", file=sys.stderr, flush=True)

        def on_train_end(self, *args, **kwargs):
            self.readings.append([now() for now in CLOCKS])
            print(json.dumps({"readings": self.readings, "snapshots": snapshots}), flush=True)
            os._exit(0)

    model = load_model(options)
    args = FederatedSketchConfig(
        output_dir=tempfile.mkdtemp(prefix="run-", dir=os.environ["TMPDIR"]),
        use_cpu=options.cpu,
        **QUIET,
        num_rounds=options.rounds,
        local_steps=options.steps,
        clients_per_round=options.clients,
        per_device_train_batch_size=options.batch_size,
        save_rounds=1,
        push_to_hub=True,
        push_rounds=2,
        hub_model_id="user/run",
        hub_token=TOKEN,
    )
    trainer = FederatedSketchTrainer(
        model=model,
        args=args,
        train_dataset=make_rows(options, model.config.vocab_size),
        processing_class=make_tokenizer(),
        peft_config=LoraConfig(r=options.rank, lora_alpha=options.rank, target_modules=TARGETS),
        callbacks=[Clock()],
    )
    snapshots = _timed_snapshots(trainer.publisher)
    trainer.train()


def _timed_snapshots(publisher) -> list[tuple[int, list[float]]]:
    """The round, and the seconds of the loop's call by both clocks, of all calls from here on."""
    taken, publish = [], publisher.publish

    def timed(over, *args, **kwargs):
        start = [now() for now in CLOCKS]
        publish(over, *args, **kwargs)
        seconds = [now() - then for now, then in zip(CLOCKS, start, strict=True)]
        taken.append((over.number, seconds))

    publisher.publish = timed
    return taken


def measure(options: argparse.Namespace) -> dict:
    sys.path.insert(0, str(Path(__file__).parents[2]))  # the tests' Hub is not part of the package
    from tests.support.hub_server import HubServer

    with HubServer() as hub, tempfile.TemporaryDirectory() as folder:
        hub.upload_mode = "lfs"
        hub.users[TOKEN] = {"name": "user", "role": "write", "orgs": []}
        hub.fault("commit", stall_s=options.stall, times=None)
        environment = {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "TMPDIR": folder}
        measured = run_again(__file__, "--worker", environment=environment)
        hub.mend()
    return measured


def summarise(measured: dict, clock: int) -> dict:
    """Seconds of quiet rounds, and what a push adds, by one clock."""
    readings = [reading[clock] for reading in measured["readings"]]
    rounds = [after - before for before, after in pairwise(readings)]
    taken = [0.0] * len(rounds)
    for number, seconds in measured["snapshots"]:
        if number:
            taken[number - 1] += seconds[clock]
    rounds = [seconds - snapshot for seconds, snapshot in zip(rounds, taken, strict=True)]
    busy = range(2, len(rounds) - 1, 2)  # from 0: round 3, after the push of round 2, and so on
    beside = [rounds[number] - (rounds[number - 1] + rounds[number + 1]) / 2 for number in busy]
    quiet, snapshot = statistics.median(rounds[1::2]), statistics.median(taken[1:-1:2])
    push = snapshot + statistics.median(beside)
    return {
        "quiet_round": quiet,
        "snapshot": snapshot,
        "beside": statistics.median(beside),
        "push": push,
        "growth": {every: push / (every * quiet) for every in (1, 2, 10)},
        "rounds": rounds,
        "all_beside": beside,
    }


def main() -> None:
    options = parse()
    if options.worker:
        work(options)
        return
    measured = measure(options)
    summary = {name: summarise(measured, clock) for clock, name in enumerate(("seconds", "processor_seconds"))}
    for name, row in summary.items():
        print(f"{name}: a quiet round {row['quiet_round']:.2f}, a push {row['push']:.2f}: {row['snapshot']:.2f} in "
              f"the loop, {row['beside']:.2f} in the round after it")  # fmt: skip
    growth = ", ".join(f"{share:+.1%} when every {every}. round is pushed"
                       for every, share in summary["seconds"]["growth"].items())  # fmt: skip
    print(f"With a Hub that waits {options.stall:g} s at each commit, training time changes by {growth}.")
    write_result(options, summary, PACKAGES, hidden=("scored",), hardware={"device": processor()})


if __name__ == "__main__":
    main()
