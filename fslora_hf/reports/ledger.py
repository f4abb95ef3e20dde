"""Tables and figures from the ledger of a run (`rounds.jsonl`, one line a round)."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator

from ..storage.files import whole_file
from ..storage.ledger import read_records
from .style import ACCENT, DARK, GREY, RANK_COLOURS, dress
from .tables import as_text

PER_CLIENT = ("clients", "ranks", "weights", "losses", "update_norms")
PER_ROUND = ("round", "refused", "bytes_down", "bytes_up", "bytes_full_rank", "seconds")
HEADER = ("round", "clients", "ranks", "loss", "update norm", "MB up", "MB down", "seconds", "refused")
LISTED = 6  # the table names up to so many clients of a round one by one, and counts more
BARS = 30  # the figure draws up to so many clients of a run one by one, and counts more by rank


def read_ledger(path: str | Path) -> list[dict]:
    """The rounds of the ledger at `path`, in order.

    A last line that was cut off while it was written is left out: a resumed run repeats that round.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line is not a round's record, or the rounds do not follow one another.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"Expected a ledger at {path}, found no file: name the rounds.jsonl of an output_dir.")
    rows = read_records(path)
    for number, row in enumerate(rows, 1):
        check_round(row, f"line {number} of {path}")
    for before, row in pairwise(rows):
        if row["round"] != before["round"] + 1:
            raise ValueError(
                f"Expected round {before['round'] + 1} after round {before['round']} in {path}, found round "
                f"{row['round']}: give the ledger of one run as the run wrote it."
            )
    return rows


def check_round(row: dict, where: str) -> None:
    """See that a record has what a round's has, of the right kinds.

    Raises:
        ValueError: it has not.
    """
    remedy = "give the rounds.jsonl of a run as the run wrote it."
    missing = [key for key in (*PER_ROUND, *PER_CLIENT) if key not in row]
    if missing:
        raise ValueError(f"Expected a round's record on {where}, found none of {', '.join(missing)}: {remedy}")
    lists, numbers = (*PER_CLIENT, "refused"), [key for key in PER_ROUND if key != "refused"]
    wrong = [key for key in lists if not isinstance(row[key], list)]
    wrong += [key for key in numbers if type(row[key]) not in (int, float) or not 0 <= row[key] < 2**63]
    wrong += [key for key in PER_CLIENT if key not in wrong and not all(map(_is_value, row[key]))]
    wrong += ["refused"] * ("refused" not in wrong and not all(map(_is_refusal, row["refused"])))
    if wrong:
        raise ValueError(f"Expected a round's record on {where}, found other values for {', '.join(wrong)}: {remedy}")
    lengths = {key: len(row[key]) for key in PER_CLIENT}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"Expected one entry a client in every list on {where}, found lengths {lengths}: {remedy}")


def _is_value(value: object) -> bool:
    """Whether it can stand for a client in a list: a number, or null where there is none. A norm that is refused for
    its size is a number, too; an integer that no float holds cannot be drawn."""
    return value is None or type(value) is float and math.isfinite(value) or type(value) is int and abs(value) < 2**63


def _is_refusal(entry: object) -> bool:
    return isinstance(entry, dict) and type(entry.get("client_id")) is int and isinstance(entry.get("reason"), str)


def totals(rows: Sequence[dict]) -> dict:
    """Sums over the rounds: `bytes_up`, `bytes_down`, `bytes_total`, `bytes_full_rank` (what the same cohorts would
    have moved at the global rank), `ratio` of the last two (None if nothing moved), `seconds`, `rounds`, `refused`."""
    sums = {key: sum(row[key] for row in rows) for key in ("bytes_up", "bytes_down", "bytes_full_rank", "seconds")}
    moved = sums["bytes_up"] + sums["bytes_down"]
    ratio = moved / sums["bytes_full_rank"] if sums["bytes_full_rank"] else None
    refused = sum(len(row["refused"]) for row in rows)
    return {**sums, "bytes_total": moved, "ratio": ratio, "rounds": len(rows), "refused": refused}


def ledger_table(rows: Sequence[dict], every: int = 1) -> str:
    """A text table: every `every`-th round, the last one, and the sums over all of them.

    `loss` and `update norm` are means over the accepted clients with the round's weights, MB are 10**6 bytes.
    """
    if every < 1:
        raise ValueError(f"Expected every >= 1, found {every}: 1 shows all rounds.")
    shown = [row for i, row in enumerate(rows) if i % every == 0 or i == len(rows) - 1]
    total = totals(rows)
    sums = (_mb(total["bytes_up"]), _mb(total["bytes_down"]), f"{total['seconds']:.1f}", str(total["refused"]))
    cells = [HEADER, *(_cells(row) for row in shown), ("all", "", "", "", "", *sums)]
    lines = as_text(cells)
    rule = "-" * len(lines[0])
    return "\n".join([lines[0], rule, *lines[1:-1], rule, lines[-1]])


def _cells(row: dict) -> tuple[str, ...]:
    loss, norm = cohort_mean(row, "losses"), cohort_mean(row, "update_norms")
    if len(row["clients"]) <= LISTED:
        clients, ranks = (" ".join(map(str, row[key])) for key in ("clients", "ranks"))
    else:
        clients, ranks = str(len(row["clients"])) + " clients", f"{min(row['ranks'])}..{max(row['ranks'])}"
    return (
        str(row["round"]),
        clients,
        ranks,
        "-" if loss is None else f"{loss:.4f}",
        "-" if norm is None else f"{norm:.4g}",
        _mb(row["bytes_up"]),
        _mb(row["bytes_down"]),
        f"{row['seconds']:.1f}",
        " ".join(str(refusal["client_id"]) for refusal in row["refused"]) or "-",
    )


def cohort_mean(row: dict, key: str) -> float | None:
    """The mean of `losses` or `update_norms` with the round's weights (0 for refused clients); None if all were."""
    pairs = [(w, x) for w, x in zip(row["weights"], row[key], strict=True) if w > 0 and x is not None]
    return sum(w * x for w, x in pairs) / sum(w for w, _ in pairs) if pairs else None


def _mb(count: int) -> str:
    return f"{count / 1e6:.2f}"


def plot_ledger(
    rows: Sequence[dict],
    path: str | Path,
    evaluation: Mapping[int, float] | None = None,
    title: str = "Federated LoRA",
) -> None:
    """Write a PNG to `path`: loss by round, the clients' ranks, and the bytes moved against full-rank LoRA.

    `evaluation` maps a number of finished rounds to the held-out loss of the global adapter then: `{0: before, 40:
    after}`. No global backend of matplotlib is touched, so this works without a screen and beside other figures.
    """
    if not rows:
        raise ValueError("Expected at least one round to draw, found none: let the run finish a round first.")
    figure = draw_ledger(rows, evaluation or {}, title)
    with whole_file(path) as file:
        figure.savefig(file, format="png")


def draw_ledger(rows: Sequence[dict], evaluation: Mapping[int, float], title: str) -> Figure:
    """The figure that `plot_ledger` writes."""
    figure = Figure(figsize=(12, 3.9), dpi=150, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, wspace=0.04)
    FigureCanvasAgg(figure)
    figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold", color=DARK)
    axes = figure.subplots(1, 3, width_ratios=[1.45, 1, 1.15])
    top_rank = max(max(row["ranks"]) for row in rows)
    _plot_losses(axes[0], rows, evaluation, top_rank)
    _plot_ranks(axes[1], rows, top_rank)
    _plot_bytes(axes[2], rows)
    return figure


def _plot_losses(axes: Axes, rows: Sequence[dict], evaluation: Mapping[int, float], top_rank: int) -> None:
    dress(axes, "Loss", "rounds finished")
    dots = [
        (row["round"] + 1, loss, rank)
        for row in rows
        for loss, rank, weight in zip(row["losses"], row["ranks"], row["weights"], strict=True)
        if loss is not None and weight > 0
    ]
    if dots:
        at, losses, ranks = zip(*dots, strict=True)
        colours = [_rank_colour(rank, top_rank) for rank in ranks]
        size = 18 if len(rows) <= 100 else 5
        label = "one client, training" + (" (darker: higher rank)" if len(set(ranks)) > 1 else "")
        axes.scatter(at, losses, c=colours, s=size, alpha=0.8, linewidths=0, label=label)
    means = [(row["round"] + 1, cohort_mean(row, "losses")) for row in rows]
    means = [(at, mean) for at, mean in means if mean is not None]
    if means:
        axes.plot(
            *zip(*means, strict=True), color=DARK, lw=1.6 if len(means) <= 100 else 0.9, label="cohort mean, training"
        )
    if evaluation:
        points = sorted(evaluation.items())
        style = "D--" if len(points) > 2 else "D"  # a line between two points would look like a course of the run
        axes.plot(*zip(*points, strict=True), style, color=ACCENT, ms=6, lw=1.2, label="global adapter, held out")
        halo = [withStroke(linewidth=3, foreground="white")]
        text = {"textcoords": "offset points", "ha": "center", "color": ACCENT, "fontsize": 10, "path_effects": halo}
        for at, loss in {points[0], points[-1]}:
            axes.annotate(f"{loss:.3g}", (at, loss), (0, 8), fontweight="bold", **text)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.margins(x=0.05, y=0.12)
    axes.legend(frameon=False, fontsize=8.5, labelcolor=DARK, loc="best" if len(rows) <= 100 else "upper right")


def _plot_ranks(axes: Axes, rows: Sequence[dict], top_rank: int) -> None:
    """One bar a client while they can be told apart, else one a rank; the colours are those of the clients' dots."""
    ranks = {client: rank for row in rows for client, rank in zip(row["clients"], row["ranks"], strict=True)}
    if len(ranks) <= BARS:
        dress(axes, "Rank of each client", "client (above: rounds it took part in)")
        clients = sorted(ranks)
        turns = Counter(client for row in rows for client in row["clients"])
        heights = [ranks[client] for client in clients]
        bars = axes.bar(
            range(len(clients)), heights, color=[_rank_colour(rank, top_rank) for rank in heights], width=0.75
        )
        axes.bar_label(bars, [str(turns[client]) for client in clients], fontsize=8, color=GREY, padding=1)
        axes.set_xticks(range(len(clients)), list(map(str, clients)), fontsize=9 if len(clients) <= 12 else 6)
        axes.set_xlim(-0.6, max(len(clients), 5) - 0.4)
    else:
        dress(axes, f"Ranks of the {len(ranks):,} clients seen", "rank")
        counts = sorted(Counter(ranks.values()).items())
        axes.bar(*zip(*counts, strict=True), color=[_rank_colour(rank, top_rank) for rank, _ in counts])
        axes.set_ylabel("clients", color=DARK)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))


def _plot_bytes(axes: Axes, rows: Sequence[dict]) -> None:
    total = totals(rows)
    largest = max(total["bytes_total"], total["bytes_full_rank"])
    unit, name = next(
        ((u, n) for u, n in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")) if largest >= u), (1, "bytes")
    )
    dress(axes, f"Sent, up and down ({name})", "rounds finished")
    at = [rows[0]["round"], *(row["round"] + 1 for row in rows)]
    full = [0.0, *accumulate(row["bytes_full_rank"] / unit for row in rows)]
    ours = [0.0, *accumulate((row["bytes_up"] + row["bytes_down"]) / unit for row in rows)]
    share = "" if total["ratio"] is None else f" ({total['ratio']:.0%})"
    axes.plot(at, full, color=GREY, lw=2, ls="--", label=f"every client at full rank: {full[-1]:.3g} {name}")
    axes.plot(at, ours, color=RANK_COLOURS(0.6), lw=2.4, label=f"this run: {ours[-1]:.3g} {name}{share}")
    axes.fill_between(at, ours, full, color=GREY, alpha=0.12, lw=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylim(0, largest / unit * 1.35 or 1)  # room for the legend
    axes.legend(frameon=False, fontsize=8.5, labelcolor=DARK, loc="upper left")


def _rank_colour(rank: int, top_rank: int) -> tuple[float, float, float, float]:
    return RANK_COLOURS((rank - 1) / (top_rank - 1) if top_rank > 1 else 1.0)
