"""How the client's share k/r of the global rank slows convergence, on a convex problem whose optimum is known.

    python recipes/benchmarks/convergence.py

W. Fang et al., "Federated Sketching LoRA", arXiv 2501.19389, bound the number of rounds by a factor that falls as k/r
grows. Here A is fixed and the losses are least squares, so that this can be computed instead of bounded, and the
package's own plan, method and server are held against it. `least_squares.py` beside this file has the derivation.

What theory says, with L the largest curvature of a client's loss in B and mu the smallest of their mean:

- A sketch multiplies a client's curvature by up to (r/k)^2, so the step is eta = (k/r)^2 / (2 L).
- The mean of B then comes closer to the optimum of the sketched objective by the factor 1 - eta mu_k a round or a
  smaller one, and mu_k >= mu r/k: at worst 1 - (k/r) mu / (2 L). So the rounds that theory asks for grow as r/k.
- A round sends k/r of the bytes, so that the bytes to the same suboptimality need not grow as k falls.
- Sketches leave a noise floor, in proportion to eta to first order.
- The sketched objective has another optimum than the plain one, for its curvature is another ("shift" below).

Suboptimality is of the sketched objective, relative to where training starts. The prediction is the exact expectation
round by round, noise included, and no fit; measured is the mean over `--seeds` runs. Writes JSON, and a PNG beside it.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from least_squares import Law, Problem, make_problem, safe_rate  # beside this file
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from measurements import write_result

from fslora_hf.methods import ClientUpdate
from fslora_hf.methods.fslora import FSLoRA
from fslora_hf.reports.style import ACCENT, DARK, GREY, RANK_COLOURS
from fslora_hf.rounds.plan import ClientPlan, plan_round
from fslora_hf.rounds.server import ServerState

MODULE = "layer"
PREDICTED = {"color": ACCENT, "lw": 1.1, "ls": (0, (3, 2)), "zorder": 3}
PACKAGES = ("torch", "numpy", "fslora_hf")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", type=int, default=16, help="r, a power of 2: clients have r, r/2, r/4, ... 1")
    parser.add_argument("--clients", type=int, default=4, help="all of them take part in every round")
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=16, help="runs of each k/r")
    parser.add_argument("--epsilon", type=float, default=0.01, help="relative suboptimality to be reached")
    parser.add_argument("--output", default="outputs/convergence.json")
    return parser.parse_args()


def local_update(
    method: FSLoRA, server: ServerState, client: ClientPlan, position: int, problem: Problem, rate: float
) -> ClientUpdate:
    """One gradient step of a client on B alone; the factor r/k reaches the gradient through the forward pass only."""
    held = method.receive(server, client, client.sketch)
    X, Y = problem.shards[position]
    B = held.B[MODULE].requires_grad_()
    loss = (held.scale * (X @ held.A[MODULE].mT) @ B.mT - Y).square().sum() / (2 * len(X))
    (gradient,) = torch.autograd.grad(loss, B)
    changes = {MODULE: torch.zeros_like(held.A[MODULE])}, {MODULE: -rate * gradient}
    return ClientUpdate(*changes, client.weight, client.sketch, held, position)


def take_round(
    method: FSLoRA, server: ServerState, clients: Sequence[ClientPlan], problem: Problem, rate: float
) -> None:
    """One round of the package's own method and server, put together as in `fslora_hf.rounds.round`."""
    total = method.accumulator(server, clients)
    for position, client in enumerate(clients):
        method.accumulate(total, local_update(method, server, client, position, problem, rate))
    server.step(method.finish(server, total))


def simulate(problem: Problem, ranks: list[int], rate: float, rounds: int, seed: int) -> tuple[torch.Tensor, int]:
    """B after 0, 1, ... rounds of federated sketching, `[rounds + 1, out, r]`, and the bytes that a round sends up."""
    method = FSLoRA()
    server = ServerState({MODULE: problem.A.clone()}, {MODULE: torch.zeros_like(problem.linear[0])})
    path, bytes_up = [server.B[MODULE].clone()], 0
    for number in range(rounds):
        plan = plan_round(
            number,
            seed=seed,
            index=problem.index,
            ranks=np.array(ranks),
            global_rank=server.rank,
            clients_per_round=len(ranks),
            local_steps=1,
            examples_per_step=1,  # not used: the loss is over all of a client's rows
            learning_rate=lambda _: rate,
            client_weighting="num_examples",
        )
        take_round(method, server, plan.clients, problem, plan.learning_rate)
        path.append(server.B[MODULE].clone())
        bytes_up = sum(method.bytes_moved(server, client)[1] for client in plan.clients)
    return torch.stack(path), bytes_up


def first_below(curve: torch.Tensor, epsilon: float) -> int | None:
    """The first round at which the curve `[rounds + 1]` is at most `epsilon`; None if there is none."""
    below = (curve <= epsilon).nonzero()
    return int(below[0]) if len(below) else None


def log_spaced(rounds: int) -> list[int]:
    """Up to 50 rounds of 0 to `rounds`, evenly spread on a logarithmic axis."""
    return np.unique(np.geomspace(1, rounds + 1, 50).round().astype(int) - 1).tolist()


def measure(problem: Problem, k: int, rounds: int, seeds: int, epsilon: float) -> dict:
    """Prediction and measurement for clients that all have rank `k`."""
    ranks = [k] * len(problem.weights)
    law, plain = Law(problem, ranks), Law(problem, [problem.rank] * len(ranks))
    rate = safe_rate(problem, ranks)
    start = law.excess(torch.zeros_like(law.optimum))
    predicted = torch.stack([law.expected_excess(*state) for state in law.moments(rate, rounds)]) / start
    runs = [simulate(problem, ranks, rate, rounds, seed) for seed in range(seeds)]
    curves = torch.stack([law.excess(path) for path, _ in runs]) / start
    measured, error = curves.mean(0), curves.std(0) / seeds**0.5
    # The largest of all rounds, and so larger than the same of one round: of few runs it may well be 5 or 6.
    off = None if k == problem.rank else ((measured - predicted).abs() / error)[1:].max().item()
    tail = slice(-max(1, rounds // 5), None)
    reached = {"predicted": first_below(predicted, epsilon), "measured": first_below(measured, epsilon)}
    return {
        "k": k,
        "ratio": k / problem.rank,
        "step_size": rate,
        "curvature": [law.curvature[0].item(), law.curvature[-1].item()],
        "contraction": 1 - rate * law.curvature[0].item(),
        "shift": (plain.excess(law.optimum) / plain.excess(torch.zeros_like(law.optimum))).item(),
        "rounds_predicted": reached["predicted"],
        "rounds_measured": reached["measured"],
        "measured_by_predicted": reached["measured"] / reached["predicted"] if all(reached.values()) else None,
        "bytes_up_a_round": runs[0][1],
        "bytes_up": runs[0][1] * reached["measured"] if reached["measured"] else None,
        "floor_predicted": (law.floor(rate) / start).item(),
        "floor_predicted_at_half_the_step": (law.floor(rate / 2) / start).item(),
        "last_fifth_predicted": predicted[tail].mean().item(),
        "last_fifth_measured": measured[tail].mean().item(),
        "largest_standard_errors_off": off,
        "curve_rounds": (shown := log_spaced(rounds)),
        "curve_predicted": predicted[shown].tolist(),
        "curve_measured": measured[shown].tolist(),
        "curve_standard_error": error[shown].tolist(),
    }


def plot(result: dict, path: Path) -> None:
    """Suboptimality by round, and the rounds and bytes that it takes, measured against predicted."""
    figure = Figure(figsize=(12, 3.9), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    figure.get_layout_engine().set(w_pad=0.12, wspace=0.04)
    axes, epsilon = figure.subplots(1, 3, width_ratios=[1.6, 1, 1]), result["settings"]["epsilon"]
    _plot_curves(axes[0], result["results"], epsilon)
    _plot_rounds(axes[1], result["results"], epsilon)
    _plot_bytes(axes[2], result["results"], epsilon)
    for panel in axes:
        panel.spines[["top", "right"]].set_visible(False)
        panel.spines[["left", "bottom"]].set_color(GREY)
        panel.tick_params(colors=DARK, labelsize=9)
        panel.grid(axis="y", color=GREY, alpha=0.25, lw=0.7)
        panel.title.set_color(DARK)
        for axis in (panel.xaxis, panel.yaxis):
            if axis.get_scale() == "log" and axis.get_label_text() != "k/r":
                axis.set_major_formatter("{x:g}")
    figure.savefig(path, format="png")


def _share(row: dict) -> str:
    return "1" if row["ratio"] == 1 else f"1/{1 / row['ratio']:.0f}"


def _colour(place: int, count: int) -> tuple[float, float, float, float]:
    return RANK_COLOURS(place / max(count - 1, 1))


def _plot_curves(axes: Axes, rows: list[dict], epsilon: float) -> None:
    axes.set_title("Suboptimality, relative to the start", loc="left", fontsize=11)
    for place, row in enumerate(rows):
        at, colour = np.array(row["curve_rounds"]) + 1, _colour(place, len(rows))  # a logarithm has no round 0
        axes.plot(at, row["curve_measured"], color=colour, lw=2.2, label=f"k/r = {_share(row)}")
        axes.plot(at, row["curve_predicted"], **PREDICTED)
    axes.axhline(epsilon, color=GREY, lw=0.8)
    axes.plot([], [], **PREDICTED, label="predicted")
    axes.set(xscale="log", yscale="log", xlabel="rounds + 1", ylim=(1e-4, 1.3), xlim=(1, None))
    axes.xaxis.label.set_color(DARK)
    axes.legend(frameon=False, fontsize=8.5, labelcolor=DARK, loc="lower left")


def _plot_rounds(axes: Axes, rows: list[dict], epsilon: float) -> None:
    axes.set_title(f"Rounds to {epsilon:g} of the start", loc="left", fontsize=11)
    at = [row["ratio"] for row in rows]
    bound = [(rows[-1]["rounds_predicted"] or np.nan) / share for share in at]
    axes.plot(at, bound, color=GREY, lw=1, ls=":", label="r/k times those of k = r")
    axes.plot(at, [row["rounds_predicted"] or np.nan for row in rows], **PREDICTED, label="predicted")
    _dots(axes, rows, [row["rounds_measured"] for row in rows])
    if any(row["rounds_predicted"] for row in rows):
        axes.set_yscale("log")
    axes.legend(frameon=False, fontsize=8.5, labelcolor=DARK)


def _plot_bytes(axes: Axes, rows: list[dict], epsilon: float) -> None:
    axes.set_title(f"kB sent up to {epsilon:g} of the start", loc="left", fontsize=11)
    kilobytes = [(row["rounds_predicted"] or np.nan) * row["bytes_up_a_round"] / 1e3 for row in rows]
    axes.plot([row["ratio"] for row in rows], kilobytes, **PREDICTED, label="predicted")
    _dots(axes, rows, [row["bytes_up"] and row["bytes_up"] / 1e3 for row in rows])
    axes.set_ylim(0, 1.2 * axes.get_ylim()[1])
    axes.legend(frameon=False, fontsize=8.5, labelcolor=DARK, loc="lower right")


def _dots(axes: Axes, rows: list[dict], values: list[float | None]) -> None:
    for place, (row, value) in enumerate(zip(rows, values, strict=True)):
        if value is not None:
            label = "measured" if place == len(rows) // 2 else None
            axes.plot(row["ratio"], value, "o", ms=7, color=_colour(place, len(rows)), label=label)
            axes.annotate(
                f"{value:.0f}",
                (row["ratio"], value),
                (0, 8),
                textcoords="offset points",
                ha="center",
                fontsize=9,
                color=DARK,
            )
    axes.set_xscale("log", base=2)
    axes.set_xlabel("k/r", color=DARK)
    axes.set_xticks([row["ratio"] for row in rows], [_share(row) for row in rows])
    axes.margins(x=0.12, y=0.15)


def print_table(rows: list[dict]) -> None:
    print(f"{'k/r':>6}{'rounds':>8}{'predicted':>11}{'measured/predicted':>20}{'kB up':>8}{'floor':>10}{'shift':>8}")
    for row in rows:
        if row["measured_by_predicted"] is None:
            print(f"{_share(row):>6}  not reached: more --rounds, or a larger --epsilon")
            continue
        print(
            f"{_share(row):>6}{row['rounds_measured']:8}{row['rounds_predicted']:11}{row['measured_by_predicted']:20.3f}"
            f"{row['bytes_up'] / 1e3:8.0f}{row['floor_predicted']:10.1e}{row['shift']:8.2f}"
        )


def main() -> None:
    options = parse()
    torch.set_num_threads(1)  # matrices of 16 x 16 gain nothing from a second one
    problem = make_problem(options.rank, options.clients)
    shares = [2**power for power in range(options.rank.bit_length())]
    start, rows = time.monotonic(), []
    for k in shares:
        rows.append(measure(problem, k, options.rounds, options.seeds, options.epsilon))
        print(f"k/r = {k}/{options.rank} after {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
    print_table(rows)
    plot(write_result(options, rows, PACKAGES), Path(options.output).with_suffix(".png"))


if __name__ == "__main__":
    main()
