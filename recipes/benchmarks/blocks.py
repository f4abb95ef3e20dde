"""Tokens per second and peak memory by clients a step, to choose `per_device_train_clients` by.

    python recipes/benchmarks/blocks.py --model ~/.cache/fslora_hf/SmolLM2-135M-Instruct --cpu
    python recipes/benchmarks/blocks.py --model llama3.2-3b --dtype bfloat16 --length 256 --with_sft

A federation of as many clients as the largest block; a round's cohort is one block, drawn by the plan. Clients have
the full global rank (`full`), or ranks spread evenly from 1 to it (`mixed`); a block is as wide as the highest rank in
it, and here it is the whole round. Every measurement is a process of its own, so that its peak memory is its own, and
the blocks take turns, so that a machine whose speed drifts drifts for all; medians. `--with_sft` measures plain
SFTTrainer beside them, given all rows of the block at once. The last column is the part of the device's matrix rate
that the operations of a step come to (formula: matrix_rate.py). Writes JSON, and a PNG beside it.
"""

import argparse
import json
from pathlib import Path

from measurements import write_result  # beside this file
from step_rows import add_rows_option
from throughput import LOSSES, PACKAGES, add_work_options, figures, time_steps
from turns import run_again, take_turns

LAWS = {"full": "all clients at full rank", "mixed": "ranks from 1 to it", "sft": "SFTTrainer, the whole batch"}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_work_options(parser, batch_size=2)
    add_rows_option(parser)
    parser.add_argument("--blocks", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32], help="clients of a step")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=4, help="timed steps of a process, after two that are not timed")
    parser.add_argument("--repeats", type=int, default=3, help="processes of each measurement")
    parser.add_argument("--scored", choices=LOSSES, default="completion", help="which tokens have a loss")
    parser.add_argument("--with_sft", action="store_true", help="measure SFTTrainer at the same batches, too")
    parser.add_argument("--output", default="outputs/blocks.json")
    parser.add_argument("--worker", nargs=2, metavar=("LAW", "BLOCK"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    problems = _problems(options)
    if problems:
        parser.error(" ".join(problems))
    options.clients = max(options.blocks)
    return options


def _problems(options: argparse.Namespace) -> list[str]:
    """One sentence for each option that cannot be measured with."""
    problems = []
    for name in ("blocks", "rank", "steps", "repeats", "batch_size", "length", "completion"):
        value = getattr(options, name)
        numbers = value if isinstance(value, list) else [value]
        if min(numbers) < 1:
            problems.append(f"Expected --{name} from 1 on, found {' '.join(map(str, numbers))}: raise it.")
    if len(set(options.blocks)) < len(options.blocks):
        problems.append(f"Expected every number of --blocks once, found {' '.join(map(str, options.blocks))}: "
                        "leave out what is double; --repeats measures again.")  # fmt: skip
    if options.completion >= options.length:
        problems.append(
            f"Expected --completion below --length {options.length}, found {options.completion}: lower it."
        )
    return problems


def spread_ranks(clients: int, highest: int) -> list[int]:
    """Ranks evenly from 1 to the highest, which one client has in any case."""
    return [highest - (highest - 1) * client // max(clients - 1, 1) for client in range(clients)]


def work(options: argparse.Namespace, law: str, block: int) -> dict:
    """Time the steps of one block in this process."""
    if law == "sft":
        return time_steps(options, block, None)
    ranks = [options.rank] * options.clients if law == "full" else spread_ranks(options.clients, options.rank)
    return time_steps(options, block, {"clients_per_round": block, "client_ranks": ranks})


def run_worker(case: tuple[str, int]) -> dict:
    law, block = case
    return run_again(__file__, "--worker", law, str(block))


def measure(options: argparse.Namespace) -> dict[tuple[str, int], list[dict]]:
    """What the processes of each law and block measured."""
    laws = [law for law in LAWS if law != "sft" or options.with_sft]
    cases = [(law, block) for block in options.blocks for law in laws]
    runs = take_turns(cases, options.repeats, run_worker, lambda case, _: f"{case[1]} clients, {case[0]}")
    return dict(zip(cases, runs, strict=True))


def summarise(measured: dict[tuple[str, int], list[dict]]) -> dict[str, list[dict]]:
    """By law, a row for each block: what was measured, and its speed and memory against the smallest block's, and
    against SFTTrainer's at the same batch where that was measured."""
    rows = {case: figures(runs) for case, runs in measured.items()}
    smallest = min(block for _, block in rows)
    results: dict[str, list[dict]] = {}
    for (law, block), row in rows.items():
        others = {"smallest": rows[law, smallest], "sft": rows.get(("sft", block))}
        for name, other in others.items():
            if other is not None:
                row[f"speed_against_{name}"] = row["tokens_per_second"] / other["tokens_per_second"]
                row[f"memory_against_{name}"] = row["peak_gigabytes"] / other["peak_gigabytes"]
        results.setdefault(law, []).append({"clients": block, **row})
    return results


def print_tables(results: dict[str, list[dict]]) -> None:
    for law, rows in results.items():
        print(f"\n{LAWS[law]}")
        print(f"{'clients a step':>16}{'tokens/s':>10}{'vs smallest':>13}{'vs SFT':>8}{'peak GB':>9}{'of matmul':>11}")
        for row in rows:
            against = f"{row['speed_against_sft']:.2f}" if "speed_against_sft" in row else "-"
            print(f"{row['clients']:16}{row['tokens_per_second']:10.0f}{row['speed_against_smallest']:13.2f}"
                  f"{against:>8}{row['peak_gigabytes']:9.2f}{row['part_of_matrix_rate']:11.1%}")  # fmt: skip


def plot(results: dict[str, list[dict]], output: str) -> None:
    """A PNG beside the JSON file `output`: speed and memory by clients a step."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    labels = {"tokens_per_second": "tokens per second", "peak_gigabytes": "peak memory, GB"}
    for axes, (name, label) in zip(figure.subplots(1, len(labels)), labels.items(), strict=True):
        for law, rows in results.items():
            colour = "#9aa5b1" if law == "sft" else None
            points = [row["clients"] for row in rows], [row[name] for row in rows]
            axes.plot(*points, marker="o", markersize=4, label=LAWS[law], color=colour)
        axes.set_xscale("log", base=2)
        clients = sorted({row["clients"] for rows in results.values() for row in rows})
        axes.set_xticks(clients, [str(number) for number in clients])
        axes.set(xlabel="clients a step", ylabel=label)
        axes.set_ylim(bottom=0)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize=7)
    figure.savefig(Path(output).with_suffix(".png"), dpi=130)


def main() -> None:
    options = parse()
    if options.worker:
        law, block = options.worker
        print(json.dumps(work(options, law, int(block))))
        return
    measured = measure(options)
    results = summarise(measured)
    print_tables(results)
    one = next(iter(measured.values()))[0]
    hardware = {key: one[key] for key in ("device", "threads", "matrix_rate")}
    write_result(options, results, PACKAGES, hidden=("clients",), hardware=hardware)
    plot(results, options.output)


if __name__ == "__main__":
    main()
