"""Time and memory of planning, hand-over and aggregation: by number of clients, by cohort, and by rank.

    python recipes/benchmarks/scale.py

Nothing trains a language model here. Measured are, each in a process of its own, in turn, and as medians:

- clients: the client index and ranks, a round's plan (the first, later ones, and rounds from `--late_round` on), and
  the cohort's sketches for 28 layers of 5 modules, each drawn once. Every client has `--examples` rows; ranks are
  uniform from 1 to `--rank`.
- cohorts: the same by size of the cohort, and a round of the engine without its local steps, on one layer of Llama 3.2
  3B: hand-over (restrict, check, load into the stack), fold (take the change out, check, accumulate), and close
  (finish and server step). A model has 28 such layers; times are to be multiplied.
- ranks: that round with all clients at one rank.
- startup: construction of SFTTrainer and FederatedSketchTrainer on the same `--startup_clients` tokenised rows, a
  client each, and what `train()` does before its first step.
- resume: from `train(resume_from_checkpoint=True)` to the first step, at round 1 and at `--late_round`. Half a second
  beyond round 1 counts as equally fast: loading any model that is worth it takes longer.

Bytes are the most that the process held beyond what it held before (Linux: VmHWM); the column of client ids and the
rows were held before. Writes JSON, and a PNG beside it; prints what is to be held to a target with it.
"""

import argparse
import json
import statistics
from pathlib import Path

from measurements import processor, write_result  # beside this file
from scale_parts import ADAPTED, KINDS
from turns import SEEN, run_again, take_turns

SWEEPS = ("clients", "cohorts", "ranks", "startup", "resume")
PACKAGES = "numpy torch transformers trl peft datasets fslora_hf".split()
PLAN_SECONDS, PLAN_BYTES, STARTUP_SECONDS, RESUME_SECONDS = 0.05, 200e6, 2.0, 0.5


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--sweeps", nargs="+", choices=SWEEPS, default=[*SWEEPS])
    add("--clients", type=int, nargs="+", default=[10, 100, 1000, 10_000, 100_000, 1_000_000])
    add("--cohort", type=int, default=100, help="clients of a round where their number in all is varied")
    add("--cohorts", type=int, nargs="+", default=[1, 10, 100, 1000], help="of the most clients")
    add("--ranks", type=int, nargs="+", default=[1, 4, 16, 64])
    add("--rank_cohort", type=int, default=10, help="clients of a round where the rank is varied")
    add("--rank", type=int, default=64, help="of the global adapter")
    add("--layer", choices=ADAPTED, default="llama3.2-3b", help="shapes that are handed over")
    add("--block", type=int, default=1, help="clients in the stack at a time")
    add("--examples", type=int, default=4, help="rows of a client")
    add("--local_steps", type=int, default=10)
    add("--batch_size", type=int, default=8, help="examples of a local step")
    add("--plans", type=int, default=9, help="later rounds, and late ones, whose median is taken")
    add("--late_round", type=int, default=10_000)
    add("--startup_clients", type=int, default=1_000_000)
    add("--resume_clients", type=int, default=1000)
    add("--resume_cohort", type=int, default=100)
    add("--repeats", type=int, default=3, help="processes of each measurement")
    add("--output", default="outputs/scale.json")
    add("--worker", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    problems = _problems(options)
    if problems:
        parser.error(" ".join(problems))
    return options


def _problems(options: argparse.Namespace) -> list[str]:
    """One sentence for each option that cannot be measured with."""
    problems = []
    for name, value in vars(options).items():
        numbers = value if isinstance(value, list) else [value]
        if any(isinstance(number, int) and number < 1 for number in numbers):
            problems.append(f"Expected --{name} from 1 on, found {' '.join(map(str, numbers))}: raise it.")
    if max(options.ranks) > options.rank:
        problems.append(f"Expected --ranks of at most the global --rank {options.rank}, found {max(options.ranks)}: "
                        "lower them, or raise it.")  # fmt: skip
    if max(*options.cohorts, options.rank_cohort) > max(options.clients):
        most = max(*options.cohorts, options.rank_cohort)
        problems.append(f"Expected --cohorts and --rank_cohort of at most the most --clients, {max(options.clients)}, "
                        f"found {most}: lower them, or add more clients.")  # fmt: skip
    if options.late_round < 2:
        problems.append(f"Expected --late_round after round 1, found {options.late_round}: raise it.")
    return problems


def make_cases(options: argparse.Namespace) -> list[tuple[str, str, dict]]:
    """All measurements: the sweep, the kind of measurement, and its arguments."""
    most, r = max(options.clients), options.rank
    cohorts = [{"clients": most, "cohort": cohort} for cohort in options.cohorts]
    cases = [
        *(("clients", "planning", {"clients": n, "cohort": min(n, options.cohort)}) for n in options.clients),
        *(("cohorts", "planning", size) for size in cohorts),
        *(("cohorts", "hand_over", {**size, "low": 1, "high": r}) for size in cohorts),
        *(
            ("ranks", "hand_over", {"clients": most, "cohort": options.rank_cohort, "low": rank, "high": rank})
            for rank in options.ranks
        ),
        *(("startup", "startup", {"trainer": trainer}) for trainer in ("sft", "federated")),
        *(("resume", "resume", {"round": round}) for round in (1, options.late_round)),
    ]
    return [case for case in cases if case[0] in options.sweeps]


def run_worker(case: tuple[str, str, dict]) -> dict[str, float]:
    _, kind, arguments = case
    return run_again(__file__, "--worker", json.dumps([kind, arguments]), environment=SEEN)


def measure(options: argparse.Namespace) -> dict[str, list[dict]]:
    """By sweep, a row for each of its points: the arguments, and the median of every reading."""
    cases = make_cases(options)
    runs = take_turns(cases, options.repeats, run_worker, lambda case, _: f"{case[1]} {case[2]}")
    results: dict[str, list[dict]] = {}
    for (sweep, kind, arguments), readings in zip(cases, runs, strict=True):
        medians = {name: statistics.median(one[name] for one in readings) for name in readings[0]}
        results.setdefault(sweep, []).append({"kind": kind, **arguments, **medians})
    return results


def judge(results: dict[str, list[dict]]) -> list[dict]:
    """What is held to a target: what it is, the figure, the bound, and whether it is kept."""
    held = []
    if "clients" in results:
        row = max(results["clients"], key=lambda row: row["clients"])
        round = f"a round of {row['cohort']} of {row['clients']:,} clients"
        held.append((f"seconds to plan {round}", row["later_plan_seconds"], PLAN_SECONDS))
        held.append((f"bytes of the index, the ranks and the plan of {round}", row["all_bytes"], PLAN_BYTES))
    if "startup" in results:
        sft, federated = results["startup"]
        more = federated["construction_seconds"] - sft["construction_seconds"]
        held.append(("seconds of construction beyond SFTTrainer's", more, STARTUP_SECONDS))
    if "resume" in results:
        early, late = results["resume"]
        more = late["resume_seconds"] - early["resume_seconds"]
        held.append((f"seconds of resuming at round {late['round']:,} beyond round {early['round']}'s", more,
                     RESUME_SECONDS))  # fmt: skip
    return [{"what": what, "found": found, "bound": bound, "kept": found < bound} for what, found, bound in held]


def print_tables(results: dict[str, list[dict]], targets: list[dict]) -> None:
    for sweep, rows in results.items():
        for kind in dict.fromkeys(row["kind"] for row in rows):
            print(f"\n{sweep}: {kind} (ms, MB)")
            alike = [{name: row[name] for name in row if name != "kind"} for row in rows if row["kind"] == kind]
            headings = [name.replace("_seconds", " ms").replace("_bytes", " MB") for name in alike[0]]
            for cells in (headings, *([_cell(*item) for item in row.items()] for row in alike)):
                print("".join(f"{cell:>18}" for cell in cells))
    print()
    for target in targets:
        kept = "kept" if target["kept"] else "MISSED"
        print(f"{target['what']}: {target['found']:.3g}, to be below {target['bound']:g}: {kept}")


def _cell(name: str, value: float | str) -> str:
    if name.endswith("_seconds"):
        return f"{value * 1e3:.4g}"
    return f"{value / 1e6:.4g}" if name.endswith("_bytes") else str(value)


def plot(results: dict[str, list[dict]], output: str) -> None:
    """A PNG beside the JSON file `output`: a panel for each sweep over numbers, both axes logarithmic."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = [(sweep, x) for sweep, x in (("clients", "clients"), ("cohorts", "cohort"), ("ranks", "high"))
              if sweep in results]  # fmt: skip
    if not panels:
        return
    figure = Figure(figsize=(3.6 * len(panels), 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (sweep, x) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        lines: dict[str, list[tuple[float, float]]] = {}
        for row in results[sweep]:
            for name, value in row.items():
                if name.endswith("_seconds"):
                    lines.setdefault(name.removesuffix("_seconds").replace("_", " "), []).append((row[x], value))
        for name, points in lines.items():
            axes.loglog(*zip(*points, strict=True), marker="o", markersize=3, label=name)
        labels = {"clients": "clients in all", "cohort": "clients of a round", "high": "rank of every client"}
        axes.set(title=f"by {sweep}", xlabel=labels[x], ylabel="seconds")
        axes.legend(fontsize=7)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(Path(output).with_suffix(".png"), dpi=130)


def main() -> None:
    options = parse()
    if options.worker:
        kind, arguments = options.worker
        print(json.dumps(KINDS[kind](options, **arguments)))
        return
    results = measure(options)
    targets = judge(results)
    print_tables(results, targets)
    write_result(options, results, PACKAGES, targets=targets, hardware={"device": processor()})
    plot(results, options.output)


if __name__ == "__main__":
    main()
