"""Tokens per second and peak memory of local steps, against plain SFTTrainer on the same tokens.

    python recipes/benchmarks/throughput.py --model ~/.cache/fslora_hf/SmolLM2-135M-Instruct --cpu
    python recipes/benchmarks/throughput.py --model llama3.2-3b --dtype bfloat16 --length 256 --clients 10
    python recipes/benchmarks/throughput.py --model FOLDER --rows FOLDER_OF_ROWS --cpu

Every measurement is a process of its own, so that its peak memory is its own; the variants take turns (A B C D,
A B C D, ...), so that a machine whose speed drifts drifts for all. Clients have the full global rank: nothing is
gained by training less. Random rows have one length; those of `--rows` have their own, and padding is not counted as
tokens. Ratios are of medians. Noted beside the speed is which part of the device's matrix rate it is
(matrix_rate.py). Writes JSON, and a PNG beside it.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

from matrix_rate import flops_per_token, matrix_rate  # beside this file
from measurements import processor, write_result
from step_rows import QUIET, RANDOM, CountingCollator, add_rows_option, rows_and_tokenizer
from turns import run_again, take_turns

VARIANTS = {
    "sft": "SFTTrainer, one client's batch",
    "one": "FederatedSketchTrainer, one client a step",
    "sft_block": "SFTTrainer, the block's whole batch",
    "block": "FederatedSketchTrainer, a block a step",
}
LOSSES = {"completion": "completions", "all": "all tokens"}
PACKAGES = "torch transformers trl peft accelerate datasets fslora_hf".split()
# Shapes of models that can be timed with random weights.
SHAPES = {
    "smollm2-135m": dict(hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
                         num_key_value_heads=3, vocab_size=49152, tie_word_embeddings=True),
    "llama3.2-1b": dict(hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
                        num_key_value_heads=8, head_dim=64, vocab_size=128256, tie_word_embeddings=True),
    "llama3.2-3b": dict(hidden_size=3072, intermediate_size=8192, num_hidden_layers=28, num_attention_heads=24,
                        num_key_value_heads=8, head_dim=128, vocab_size=128256, tie_word_embeddings=True),
}  # fmt: skip
TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]


def add_work_options(parser: argparse.ArgumentParser, batch_size: int) -> None:
    """What a local step computes."""
    parser.add_argument("--model", default="smollm2-135m", help=f"a folder, or random weights of {', '.join(SHAPES)}")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--cpu", action="store_true", help="do not use a GPU")
    parser.add_argument("--batch_size", type=int, default=batch_size, help="rows of one client in a step")
    parser.add_argument("--length", type=int, default=96, help="tokens of a random row")
    parser.add_argument("--completion", type=int, default=8, help="tokens of it scored with loss on completions")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_work_options(parser, batch_size=4)
    add_rows_option(parser)
    parser.add_argument("--clients", type=int, default=4, help="clients in a block")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=8, help="timed steps of a process, after two that are not timed")
    parser.add_argument("--repeats", type=int, default=3, help="processes of each variant")
    parser.add_argument("--losses", nargs="+", choices=LOSSES, default=[*LOSSES], help="which tokens are scored")
    parser.add_argument("--output", default="outputs/throughput.json")
    parser.add_argument("--worker", choices=VARIANTS, help=argparse.SUPPRESS)
    parser.add_argument("--scored", choices=LOSSES, default="completion", help=argparse.SUPPRESS)
    return parser.parse_args()


def load_model(options: argparse.Namespace):
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    dtype = getattr(torch, options.dtype)
    if options.model in SHAPES:
        torch.manual_seed(0)
        config = LlamaConfig(**SHAPES[options.model], max_position_embeddings=4096)
        return AutoModelForCausalLM.from_config(config, dtype=dtype)
    return AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype)


def work(options: argparse.Namespace) -> dict:
    """Time the steps of one variant in this process."""
    block = options.clients if options.worker in ("block", "sft_block") else 1
    federated = {"clients_per_round": block} if options.worker in ("one", "block") else None
    return time_steps(options, block, federated)


def time_steps(options: argparse.Namespace, block: int, federated: dict | None) -> dict:
    """Time local steps in this process.

    Args:
        options: `add_work_options`, and `clients`, `rank`, `steps` and `scored`.
        block: the clients whose rows a step trains on.
        federated: settings of FederatedSketchTrainer; None to time SFTTrainer on as many rows.
    """
    import torch
    from peft import LoraConfig
    from trl import SFTTrainer

    from fslora_hf import FederatedSketchTrainer
    from fslora_hf.common.host_memory import peak_bytes

    clock, steps = make_clock(), options.steps + 2
    model = load_model(options)
    rows, tokenizer = rows_and_tokenizer(options, model.config.vocab_size)
    with tempfile.TemporaryDirectory() as output_dir:
        trainer = (SFTTrainer if federated is None else FederatedSketchTrainer)(
            model=model,
            args=_settings(options, block, federated, steps, output_dir),
            train_dataset=rows,
            processing_class=tokenizer,
            peft_config=LoraConfig(r=options.rank, lora_alpha=options.rank, target_modules=TARGETS),
            callbacks=[clock],
        )
        trainer.data_collator = seen = CountingCollator(trainer.data_collator)
        trainer.train()
    seconds = [later - earlier for earlier, later in zip(clock.ends[1:-1], clock.ends[2:], strict=True)]
    on_gpu = torch.cuda.is_available() and not options.cpu
    # Before the matrix rate is measured, which takes memory of its own.
    peak = torch.cuda.max_memory_allocated() if on_gpu else peak_bytes()
    ranks = [options.rank] if federated is None else [client.rank for client in trainer.round_plan(0).clients]
    return {
        "tokens": seen.tokens[2:steps],
        "seconds": seconds,
        "peak_bytes": peak,
        "flops_per_token": flops_per_token(
            trainer.model, sum(ranks) / len(ranks), sum(seen.scored) / sum(seen.tokens)
        ),
        "matrix_rate": matrix_rate(getattr(torch, options.dtype), "cuda" if on_gpu else "cpu"),
        "device": torch.cuda.get_device_name() if on_gpu else processor(),
        "threads": torch.get_num_threads(),
    }


def _settings(options: argparse.Namespace, block: int, federated: dict | None, steps: int, output_dir: str):
    """The trainer's configuration: one round of `steps` local steps, or as many steps of SFTTrainer."""
    from trl import SFTConfig

    from fslora_hf import FederatedSketchConfig

    shared = QUIET | dict(output_dir=output_dir, use_cpu=options.cpu)
    if options.rows != RANDOM:
        shared["completion_only_loss"] = options.scored == "completion"
    if federated is None:
        batch = options.batch_size * block
        return SFTConfig(**shared, max_steps=steps, per_device_train_batch_size=batch, save_strategy="no")
    return FederatedSketchConfig(
        **shared,
        **federated,
        num_rounds=1,
        local_steps=steps,
        per_device_train_clients=block,
        per_device_train_batch_size=options.batch_size,
        save_rounds=0,
    )


def make_clock():
    """A callback that notes in `ends` when each step was done."""
    import torch
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def __init__(self):
            self.ends = []

        def on_step_end(self, args, state, control, **kwargs):
            if torch.cuda.is_available() and not args.use_cpu:
                torch.cuda.synchronize()
            self.ends.append(time.perf_counter())

    return Clock()


def run_worker(case: tuple[str, str]) -> dict:
    scored, variant = case
    return run_again(__file__, "--worker", variant, "--scored", scored)


def measure(options: argparse.Namespace) -> dict[str, dict[str, list[dict]]]:
    """By which tokens are scored, what the processes of each variant measured."""
    cases = [(scored, variant) for scored in options.losses for variant in VARIANTS]
    runs = take_turns(cases, options.repeats, run_worker, lambda case, _: ": ".join(case))
    measured = dict(zip(cases, runs, strict=True))
    return {scored: {variant: measured[scored, variant] for variant in VARIANTS} for scored in options.losses}


def summarise(measured: dict[str, list[dict]]) -> dict[str, dict]:
    """What each variant measured (`figures`), and its speed and memory against SFTTrainer's."""
    rows = {variant: figures(runs) for variant, runs in measured.items()}
    for variant, row in rows.items():
        row["against_sft"] = row["tokens_per_second"] / rows["sft"]["tokens_per_second"]
        whole = rows["sft_block"] if variant in ("block", "sft_block") else rows["sft"]
        row["against_sft_same_batch"] = row["tokens_per_second"] / whole["tokens_per_second"]
        row["memory_against_sft_same_batch"] = row["peak_gigabytes"] / whole["peak_gigabytes"]
    return rows


def figures(runs: list[dict]) -> dict:
    """Median tokens per second over all steps of all runs, their range, the largest peak of memory, and the median
    over runs of the part of the matrix rate."""
    steps = [[n / seconds for n, seconds in zip(one["tokens"], one["seconds"], strict=True)] for one in runs]
    speeds = [speed for one in steps for speed in one]
    parts = [
        statistics.median(speeds) * one["flops_per_token"] / one["matrix_rate"]
        for one, speeds in zip(runs, steps, strict=True)
    ]
    return {
        "tokens_per_second": statistics.median(speeds),
        "slowest_fastest": [min(speeds), max(speeds)],
        "peak_gigabytes": max(one["peak_bytes"] for one in runs) / 1e9,
        "flops_per_token": runs[0]["flops_per_token"],
        "part_of_matrix_rate": statistics.median(parts),
    }


def print_table(title: str, rows: dict[str, dict]) -> None:
    print(f"\n{title}")
    print(f"{'':44}{'tokens/s':>10}{'vs SFT':>8}{'vs same batch':>15}{'peak GB':>9}{'of matmul':>11}")
    for variant, row in rows.items():
        print(
            f"{VARIANTS[variant]:44}{row['tokens_per_second']:10.0f}{row['against_sft']:8.2f}"
            f"{row['against_sft_same_batch']:15.2f}{row['peak_gigabytes']:9.2f}{row['part_of_matrix_rate']:11.1%}"
        )


def plot(result: dict, output: str) -> None:
    """A PNG beside the JSON file `output`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(result["results"]), squeeze=False)[0]
    for axes, (scored, rows) in zip(panels, result["results"].items(), strict=True):
        names = [VARIANTS[variant].replace(", ", "\n") for variant in rows]
        speeds = [row["tokens_per_second"] for row in rows.values()]
        colours = ["#9aa5b1" if variant.startswith("sft") else "#2f6db3" for variant in rows]
        bars = axes.barh(names, speeds, color=colours)
        ratios = [row["against_sft_same_batch"] for row in rows.values()]
        labels = [f"{speed:.0f}  ({ratio:.2f}x)" for speed, ratio in zip(speeds, ratios, strict=True)]
        axes.bar_label(bars, labels, padding=3, fontsize=8)
        axes.set(
            title=f"loss on {scored}",
            xlabel="tokens per second (against SFTTrainer, same rows)",
            xlim=(0, max(speeds) * 1.35),
        )
        axes.invert_yaxis()
        axes.tick_params(labelsize=7)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(Path(output).with_suffix(".png"), dpi=130)


def main() -> None:
    options = parse()
    if options.worker:
        print(json.dumps(work(options)))
        return
    measured = measure(options)
    results = {LOSSES[scored]: summarise(runs) for scored, runs in measured.items()}
    one = next(iter(measured.values()))["sft"][0]
    hardware = {key: one[key] for key in ("device", "threads")}
    for title, rows in results.items():
        print_table(f"Loss on {title}", rows)
    plot(write_result(options, results, PACKAGES, hidden=("scored",), hardware=hardware), options.output)


if __name__ == "__main__":
    main()
