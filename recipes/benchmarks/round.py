"""One whole federated round, this library's against other ways to run it: seconds, and peak memory.

    python recipes/benchmarks/round.py --model ~/.cache/fslora_hf/SmolLM2-135M-Instruct --cpu
    python recipes/benchmarks/round.py --model FOLDER --rows FOLDER_OF_ROWS --cpu
    python recipes/benchmarks/round.py --model llama3.2-3b --dtype bfloat16 --length 256 --batch_size 4 --rank 64

A round is handing the global adapter over to all clients, their local steps, aggregation, and the server's step. The
other ways (`round_ways.py` says exactly what each does):

- `swap`: one resident base, and for every client its adapter of rank k put into it, and a fresh SFTTrainer;
- `reload`: the same, but every client reads the model from disk;
- `deep_copy`, the published code's: for every client a deep copy of the model, and masks on the adapter of full rank.

All train the same clients at the same ranks on the same batches. A test holds them to the same adapter, `deep_copy`
under SGD only: its AdamW does the same work, but moves B less. Ranks are mixed, of mean rank / 4, unless
`--client_ranks` says otherwise. Rows are random tokens, all equally long, or those of `--rows` with lengths of their
own.

Every measurement is a process of its own, so that its peak memory is its own; the ways take turns (A B C, A B C, ...),
so that a machine whose speed drifts drifts for all. A process runs one round that is not timed, then `--rounds` that
are; a round lasts from the end of the one before it to its own. What is done once a run, such as building this
library's one trainer, falls before the rounds that are timed. Memory is the largest from the first round on, of the
process (Linux: VmHWM) or of the GPU's allocator, and beyond what was held when the base model was loaded and nothing
else had begun (`reload` then holds no model). Of this library's rounds the parts are measured, too: what is neither
hand-over nor aggregation are the local steps, with their batches. Ratios are of medians. Writes JSON, and a PNG beside
it.
"""

import argparse
import gc
import json
import statistics
import tempfile
from pathlib import Path

from measurements import processor, write_result  # beside this file
from step_rows import RANDOM, add_rows_option, rows_and_tokenizer, tokenised_rows
from throughput import LOSSES, PACKAGES, TARGETS, add_work_options, load_model
from turns import run_again, take_turns

WAYS = {
    "ours_one": "FederatedSketchTrainer, one client a step",
    "ours_block": "FederatedSketchTrainer, a block a step",
    "swap": "a fresh SFTTrainer a client",
    "reload": "a model load and a fresh SFTTrainer a client",
    "deep_copy": "a deep copy and dense masks a client",
}
OURS = ("ours_one", "ours_block")
PARTS = ("hand_over", "local_steps", "aggregation")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_work_options(parser, batch_size=1)
    add_rows_option(parser)
    parser.add_argument("--loss", dest="scored", choices=LOSSES, default="completion", help="which tokens are scored")
    parser.add_argument("--clients", type=int, default=8, help="clients in a round")
    parser.add_argument("--block", type=int, help="clients in a step of ours_block; all unless given")
    parser.add_argument("--rank", type=int, default=16, help="of the global adapter")
    parser.add_argument("--client_ranks", type=int, nargs="+", help="one for each client; mixed unless given")
    parser.add_argument("--steps", type=int, default=20, help="local steps of a client in a round")
    parser.add_argument("--rounds", type=int, default=1, help="timed rounds of a process, after one that is not timed")
    parser.add_argument("--repeats", type=int, default=2, help="processes of each way")
    parser.add_argument("--output", default="outputs/round.json")
    parser.add_argument("--worker", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.block = options.block or options.clients
    if not options.client_ranks and options.rank % 4:
        parser.error(f"Expected a rank that 4 divides, found {options.rank}: choose one, or name --client_ranks.")
    options.client_ranks = options.client_ranks or mixed_ranks(options.clients, options.rank)
    if len(options.client_ranks) != options.clients or not all(1 <= k <= options.rank for k in options.client_ranks):
        parser.error(f"Expected {options.clients} client ranks from 1 to {options.rank}, one for each client, found "
                     f"{options.client_ranks}.")  # fmt: skip
    return options


def mixed_ranks(clients: int, rank: int) -> list[int]:
    """Ranks from 1 to rank / 2 - 1 of mean rank / 4: pairs of k and rank / 2 - k, and rank / 4 if one is left over."""
    quarter, pairs = rank // 4, clients // 2
    smaller = [1 + (quarter - 1) * pair // max(1, pairs - 1) for pair in range(pairs)]
    return [k for low in smaller for k in (low, 2 * quarter - low)] + [quarter] * (clients % 2)


# ---- One process ----


def run_way(way: str, setup, clock, block: int):
    """The global adapter after all rounds of `setup`, by one of WAYS."""
    import round_ways

    if way in OURS:
        return round_ways.ours(setup, clock, block if way == "ours_block" else 1)
    return getattr(round_ways, way)(setup, clock)


def work(options: argparse.Namespace) -> dict:
    """Run one way in this process: its rounds' seconds and parts, without the first, and its memory."""
    import torch
    from round_setup import Clock
    from transformers.utils.logging import disable_progress_bar, set_verbosity_error

    from fslora_hf.common.host_memory import forget_peak, held_bytes, peak_bytes

    disable_progress_bar()  # of each model load
    set_verbosity_error()
    on_gpu = torch.cuda.is_available() and not options.cpu
    with tempfile.TemporaryDirectory() as folder:
        setup = make_setup(options, torch.device("cuda" if on_gpu else "cpu"), folder)
        gc.collect()
        if on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        else:
            forget_peak()
        before = torch.cuda.memory_allocated() if on_gpu else held_bytes()
        clock = Clock(torch.cuda.synchronize if on_gpu else lambda: None)
        run_way(options.worker, setup, clock, options.block)
    return {
        "rounds": clock.rounds[1:],
        "bytes_before": before,
        "peak_bytes": torch.cuda.max_memory_allocated() if on_gpu else peak_bytes(),
        "device": torch.cuda.get_device_name() if on_gpu else processor(),
        "threads": torch.get_num_threads(),
    }


def make_setup(options: argparse.Namespace, device, folder: str):
    """What the command line asks for; `folder` may be used for a model of random weights while the rounds run."""
    import torch
    from peft import LoraConfig, get_peft_model
    from round_setup import Setup, read_adapter
    from throughput import SHAPES

    base, model = load_model(options).to(device), options.model
    rows, tokenizer = rows_and_tokenizer(options, base.config.vocab_size)
    if options.rows != RANDOM:
        rows = tokenised_rows(rows, tokenizer, options.scored)
    lora = LoraConfig(r=options.rank, lora_alpha=options.rank, target_modules=TARGETS)
    if options.worker == "reload" and model in SHAPES:
        base.save_pretrained(folder)
        model = folder
    torch.manual_seed(0)
    wrapped = get_peft_model(base, lora)
    start = read_adapter(wrapped)
    base = wrapped.unload()
    return Setup(
        load=lambda: load_model(argparse.Namespace(model=model, dtype=options.dtype)).to(device),
        base=None if options.worker == "reload" else base,
        lora=lora,
        start=start,
        rows=rows,
        tokenizer=tokenizer,
        ranks=options.client_ranks,
        rounds=1 + options.rounds,
        local_steps=options.steps,
        batch_size=options.batch_size,
        use_cpu=options.cpu,
    )


# ---- All of them ----


def measure(options: argparse.Namespace) -> dict[str, list[dict]]:
    def told(way: str, one: dict) -> str:
        return f"{way}: {statistics.median(round['seconds'] for round in one['rounds']):.1f} s a round"

    ways = list(WAYS)
    runs = take_turns(ways, options.repeats, lambda way: run_again(__file__, "--worker", way), told)
    return dict(zip(ways, runs, strict=True))


def summarise(measured: dict[str, list[dict]]) -> dict[str, dict]:
    """Of each way: median seconds a round, largest memory, both against ours, and what a round of ours is made of."""
    rows = {}
    for way, runs in measured.items():
        rounds = [one for run in runs for one in run["rounds"]]
        seconds = [one["seconds"] for one in rounds]
        rows[way] = {
            "seconds": statistics.median(seconds),
            "fastest_slowest": [min(seconds), max(seconds)],
            "peak_gigabytes": max(run["peak_bytes"] for run in runs) / 1e9,
            "gigabytes_beyond": max(run["peak_bytes"] - run["bytes_before"] for run in runs) / 1e9,
        }
        if way in OURS:
            rows[way] |= _parts(rounds)
    for row in rows.values():
        for one in OURS:
            row[f"seconds_against_{one}"] = row["seconds"] / rows[one]["seconds"]
            row[f"memory_against_{one}"] = row["peak_gigabytes"] / rows[one]["peak_gigabytes"]
    return rows


def _parts(rounds: list[dict]) -> dict:
    """Median seconds of a round's parts, and the median share of a round that is no local step."""
    split = [one | {"local_steps": one["seconds"] - one["hand_over"] - one["aggregation"]} for one in rounds]
    shares = [(one["hand_over"] + one["aggregation"]) / one["seconds"] for one in rounds]
    parts = {part: statistics.median(one[part] for one in split) for part in PARTS}
    return {"parts": parts, "share_beside_local_steps": statistics.median(shares)}


def print_table(rows: dict[str, dict]) -> None:
    print(f"{'':46}{'s a round':>10}{'vs one':>8}{'vs block':>10}{'peak GB':>9}{'GB beyond base':>16}")
    for way, row in rows.items():
        print(f"{WAYS[way]:46}{row['seconds']:10.2f}{row['seconds_against_ours_one']:8.2f}"
              f"{row['seconds_against_ours_block']:10.2f}{row['peak_gigabytes']:9.2f}"
              f"{row['gigabytes_beyond']:16.2f}")  # fmt: skip
    for way in OURS:
        parts = rows[way]["parts"]
        print(f"{WAYS[way]}: hand-over {parts['hand_over']:.3f} s, local steps {parts['local_steps']:.2f} s, "
              f"aggregation {parts['aggregation']:.3f} s; hand-over plus aggregation are "
              f"{rows[way]['share_beside_local_steps']:.2%} of the round.")  # fmt: skip


def plot(rows: dict[str, dict], output: str) -> None:
    """A PNG beside the JSON file `output`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    names = [WAYS[way].replace(", ", "\n").replace(" and ", "\nand ") for way in rows]
    colours = ["#2f6db3" if way in OURS else "#9aa5b1" for way in rows]
    panels = figure.subplots(1, 2, sharey=True)
    for axes, key, against, title in (
        (panels[0], "seconds", "seconds_against_ours_one", "seconds a round"),
        (panels[1], "peak_gigabytes", "memory_against_ours_one", "peak memory, GB"),
    ):
        values = [row[key] for row in rows.values()]
        labels = [f"{row[key]:.3g}  ({row[against]:.2f}x)" for row in rows.values()]
        axes.bar_label(axes.barh(names, values, color=colours), labels, padding=3, fontsize=8)
        axes.set(xlabel=f"{title} (against one client a step)", xlim=(0, max(values) * 1.4))
        axes.tick_params(labelsize=7)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].invert_yaxis()
    figure.savefig(Path(output).with_suffix(".png"), dpi=130)


def main() -> None:
    options = parse()
    if options.worker:
        print(json.dumps(work(options)))
        return
    measured = measure(options)
    rows = summarise(measured)
    print_table(rows)
    hardware = {key: measured["ours_one"][0][key] for key in ("device", "threads")}
    write_result(options, rows, PACKAGES, hardware=hardware)
    plot(rows, options.output)


if __name__ == "__main__":
    main()
