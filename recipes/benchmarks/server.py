"""What the server does in a round, for every method: time, and memory beyond the adapters it holds.

    python recipes/benchmarks/server.py

The adapter is that of one layer of Llama 3.2 3B (q, k, v, up and down projections); a model has 28 of them, one after
the other, so times are to be multiplied and memory is not. Clients' updates are random. Each measurement is a process
of its own: the accumulator with all clients' updates in it is held already when the clock starts at `finish`, and
the server's step ends it. Memory is the most that the process holds meanwhile (Linux: VmHWM) beyond what it held
before, adapters and accumulator included, and beyond the change, which is an adapter itself. Writes JSON.
"""

import argparse
import json
import statistics
import time

import numpy as np
import torch
from measurements import processor, write_result  # beside this file
from turns import SEEN, run_again, take_turns

from fslora_hf.common.host_memory import forget_peak, held_bytes, peak_bytes

LAYERS = 28
SHAPES = {  # in, out
    "q_proj": (3072, 3072),
    "k_proj": (3072, 1024),
    "v_proj": (3072, 1024),
    "up_proj": (3072, 8192),
    "down_proj": (8192, 3072),
}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", type=int, default=64, help="of the global adapter")
    parser.add_argument("--clients", type=int, default=10)
    parser.add_argument("--client_ranks", type=int, nargs="+", default=[16, 64], help="one measurement each")
    parser.add_argument("--methods", nargs="+", help="all that are built in, unless named")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", default="outputs/server.json")
    parser.add_argument("--worker", nargs=2, metavar=("METHOD", "RANK"), help=argparse.SUPPRESS)
    return parser.parse_args()


class Client:
    """A client of a cohort that is alike in everything."""

    def __init__(self, rank: int, cohort: int):
        self.client_id, self.rank, self.weight = 0, rank, 1 / cohort

    def sketch(self, module: str):
        return np.arange(self.rank)

    def fresh_rows(self, module: str, features: int):
        return np.random.default_rng(0).uniform(-1, 1, (self.rank, features)) / features**0.5


def work(name: str, client_rank: int, options: argparse.Namespace) -> dict:
    """Seconds of `finish` and the step, and the bytes that they held beyond what was there."""
    from fslora_hf.methods import METHODS, ClientUpdate
    from fslora_hf.models.folding import FoldedBase
    from fslora_hf.rounds.server import ServerState

    torch.manual_seed(0)
    method, r = METHODS[name](), options.rank
    A = {module: torch.randn(r, wide) for module, (wide, _) in SHAPES.items()}
    B = {module: torch.randn(out, r) for module, (_, out) in SHAPES.items()}
    weights = {module: torch.zeros(out, wide) for module, (wide, out) in SHAPES.items()} if method.folds else {}
    base = FoldedBase(weights, dict.fromkeys(SHAPES, 1.0)) if method.folds else None
    server = ServerState(A, B, base=base)
    cohort = [Client(client_rank, options.clients) for _ in range(options.clients)]
    accumulator = method.accumulator(server, cohort)
    for position, client in enumerate(cohort):
        held = method.receive(server, client, client.sketch)
        change = [
            {module: torch.randn_like(tensor) for module, tensor in side.items()} if letter in method.trains else {}
            for letter, side in (("A", held.A), ("B", held.B))
        ]
        method.accumulate(accumulator, ClientUpdate(*change, client.weight, client.sketch, held, position))
        del held, change
    torch.linalg.svd(torch.linalg.qr(torch.eye(8).double())[1])  # load what decomposes
    forget_peak()
    before, start = held_bytes(), time.perf_counter()
    with torch.no_grad():
        change = method.finish(server, accumulator)
        server.step(change)
    seconds, held = time.perf_counter() - start, peak_bytes() - before
    # The change is an adapter itself, held twice: the optimizer takes its negative for a gradient.
    own = 0 if method.folds else 2 * sum(t.numel() * t.element_size() for side in change for t in side.values())
    return {"seconds": seconds, "bytes": max(0, held - own)}


def run_worker(case: tuple[str, int]) -> dict:
    name, client_rank = case
    return run_again(__file__, "--worker", name, str(client_rank), environment=SEEN)


def measure(options: argparse.Namespace) -> list[dict]:
    from fslora_hf.methods import METHODS

    cases = [
        (name, rank)
        for name in options.methods or METHODS
        for rank in ([options.rank] if METHODS[name].full_rank_only else options.client_ranks)
    ]
    measured = take_turns(cases, options.repeats, run_worker, lambda case, _: f"{case[0]}, rank {case[1]}")
    return [
        {"method": name, "client_rank": rank, **{key: statistics.median(run[key] for run in runs) for key in runs[0]}}
        for (name, rank), runs in zip(cases, measured, strict=True)
    ]


def main() -> None:
    options = parse()
    if options.worker:
        print(json.dumps(work(options.worker[0], int(options.worker[1]), options)))
        return
    rows = measure(options)
    dense = max(wide * out * 4 for wide, out in SHAPES.values())
    print(f"{'method':16}{'client rank':>12}{'s a layer':>11}{'s a model':>11}{'MB beyond':>11}{'of a dense one':>16}")
    for row in rows:
        print(f"{row['method']:16}{row['client_rank']:12}{row['seconds']:11.2f}{LAYERS * row['seconds']:11.0f}"
              f"{row['bytes'] / 1e6:11.0f}{row['bytes'] / dense:16.2f}")  # fmt: skip
    hardware = {"device": processor(), "threads": torch.get_num_threads()}
    more = {"layers": LAYERS, "dense_layer_bytes": dense, "hardware": hardware}
    write_result(options, rows, ("torch", "fslora_hf"), **more)


if __name__ == "__main__":
    main()
