"""What keeping freed memory does to steps on a CPU: glibc as it comes, against what the trainer tells it.

    python recipes/benchmarks/allocator.py --model ~/.cache/fslora_hf/SmolLM2-135M-Instruct

FederatedSketchTrainer makes glibc keep what a step frees (fslora_hf/common/host_memory.py), unless the user has set
glibc's allocator by the environment. Here every other process has such a setting, which changes nothing else: it is
glibc's own default. Every measurement is a process of its own, and both take turns; medians. Writes JSON.
"""

import argparse
import json

from measurements import write_result  # beside this file
from step_rows import add_rows_option
from throughput import LOSSES, PACKAGES, add_work_options, figures, time_steps
from turns import run_again, take_turns

ALLOCATORS = {"default": {"GLIBC_TUNABLES": "glibc.malloc.tcache_count=7"}, "kept": {}}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_work_options(parser, batch_size=4)
    add_rows_option(parser)
    parser.add_argument("--blocks", type=int, nargs="+", default=[1, 4], help="clients of a step")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=8, help="timed steps of a process, after two that are not timed")
    parser.add_argument("--repeats", type=int, default=3, help="processes of each measurement")
    parser.add_argument("--scored", choices=LOSSES, default="completion", help="which tokens have a loss")
    parser.add_argument("--output", default="outputs/allocator.json")
    parser.add_argument("--worker", type=int, metavar="BLOCK", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.cpu, options.clients = True, max(options.blocks)
    return options


def run_worker(case: tuple[int, str]) -> dict:
    block, allocator = case
    return run_again(__file__, "--worker", str(block), environment=ALLOCATORS[allocator])


def measure(options: argparse.Namespace) -> tuple[list[dict], dict]:
    """A row for each number of clients a step, and the hardware."""
    cases = [(block, allocator) for block in options.blocks for allocator in ALLOCATORS]
    runs = take_turns(cases, options.repeats, run_worker, lambda case, _: f"{case[0]} clients, {case[1]}")
    measured = {case: figures(readings) for case, readings in zip(cases, runs, strict=True)}
    rows = []
    for block in options.blocks:
        default, kept = measured[block, "default"], measured[block, "kept"]
        ratios = {name: kept[key] / default[key]
                  for name, key in (("speed", "tokens_per_second"), ("memory", "peak_gigabytes"))}  # fmt: skip
        rows.append({"clients": block, "default": default, "kept": kept, **ratios})
    return rows, {key: runs[0][0][key] for key in ("device", "threads")}


def main() -> None:
    options = parse()
    if options.worker:
        print(json.dumps(time_steps(options, options.worker, {"clients_per_round": options.worker})))
        return
    rows, hardware = measure(options)
    print(f"{'clients a step':>16}{'tokens/s':>10}{'kept':>8}{'ratio':>8}{'peak GB':>9}{'kept':>8}{'ratio':>8}")
    for row in rows:
        default, kept = row["default"], row["kept"]
        print(f"{row['clients']:16}{default['tokens_per_second']:10.0f}{kept['tokens_per_second']:8.0f}"
              f"{row['speed']:8.2f}{default['peak_gigabytes']:9.2f}{kept['peak_gigabytes']:8.2f}"
              f"{row['memory']:8.2f}")  # fmt: skip
    write_result(options, rows, PACKAGES, hidden=("clients", "cpu"), hardware=hardware)


if __name__ == "__main__":
    main()
