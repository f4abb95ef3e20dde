"""The figures of a comparison, each as PNG and as SVG."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from ..reports.style import ACCENT, DARK, GREY, RANK_COLOURS, dress
from ..storage.files import whole_file

LINES = 8  # a panel has at most so many
# Told apart by eyes that see few colours, too, and by their markers in print.
COLOURS = (ACCENT, "#1b62a8", "#2e8b57", "#8a6d1f", "#7a4fa3", "#12305c", "#c2578a", "#5aa9b8")
MARKERS = "osD^vPX*"

Summary = dict[str, Any]


def draw_all(summary: Summary, folder: str | Path) -> list[tuple[str, str]]:
    """Write every figure that there are numbers for into `folder`; returns (file name without ending, caption)."""
    figures: list[tuple[str, str, Callable[[Summary], Figure | None]]] = [
        ("accuracy_by_round", "Accuracy of the global adapter against rounds", _curves("accuracy", "round")),
        ("loss_by_round", "Held-out loss against rounds", _curves("loss", "round")),
        ("accuracy_by_bytes", "Accuracy against what the clients had sent", _curves("accuracy", "megabytes_up")),
        ("loss_by_bytes", "Held-out loss against what the clients had sent", _curves("loss", "megabytes_up")),
        ("accuracy_by_rank", "Final accuracy against the mean rank of the clients", _accuracy_by_rank),
        ("loss_by_rank", "Clients' training loss against their rank", _loss_by_rank),
        ("data_split", "Rows of each client, by task", _data_split),
        ("ranks", "Ranks of the clients", _ranks),
    ]
    written = []
    for name, caption, draw in figures:
        figure = draw(summary)
        if figure is not None:
            with whole_file(Path(folder) / f"{name}.png") as file:
                figure.savefig(file, format="png")
            figure.set_layout_engine("none")  # what was laid out stays, and is not laid out again
            with whole_file(Path(folder) / f"{name}.svg") as file:
                figure.savefig(file, format="svg", metadata={"Date": None})
            written.append((name, caption))
    return written


def _figure(panels: int, width: float = 5.4, height: float = 3.9) -> tuple[Figure, list[Axes]]:
    columns = min(panels, 3 if width < 5 else 2)
    lines = -(-panels // columns)
    figure = Figure(figsize=(max(width * columns, 6.4), height * lines), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(lines, columns, squeeze=False).flatten())
    for unused in axes[panels:]:
        unused.remove()
    return figure, axes[:panels]


def panels_of(variants: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Variants by panel: all in one while they are few, else those of one case and rank law together."""
    if len(variants) <= LINES:
        return [list(variants)]
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for variant in variants:
        groups.setdefault((variant["case"], variant["rank_law"]), []).append(variant)
    if len(groups) == len(variants):  # one method: the cases are what is compared
        groups = {("", ""): list(variants)}
    return [group[i : i + LINES] for group in groups.values() for i in range(0, len(group), LINES)]


def _curves(value: str, against: str) -> Callable[[Summary], Figure | None]:
    def draw(summary: Summary) -> Figure | None:
        shown = [variant for variant in summary["variants"] if any(point[value] for point in variant["curve"])]
        if not shown:
            return None
        panels = panels_of(shown)
        figure, axes = _figure(len(panels), 7.2 if len(panels) == 1 else 5.4, 4.2)
        for axis, variants in zip(axes, panels, strict=True):
            _plot_curves(axis, variants, value, against)
            if value == "accuracy":
                _accuracy_axis(axis, summary)
            _label_lines(axis)
        return figure

    return draw


def _plot_curves(axis: Axes, variants: Sequence[dict[str, Any]], value: str, against: str) -> None:
    title = {"accuracy": "Accuracy, mean over tasks", "loss": "Held-out loss, nats a token"}[value]
    dress(axis, title, {"round": "rounds finished", "megabytes_up": "sent by clients, MB"}[against])
    for number, variant in enumerate(variants):
        points = [point for point in variant["curve"] if point[value]]
        at = [point[against] for point in points]
        mean = [point[value]["mean"] for point in points]
        spread = [point[value]["spread"] or 0.0 for point in points]
        style = {"color": COLOURS[number], "marker": MARKERS[number], "ms": 4, "lw": 1.6}
        axis.plot(at, mean, label=variant["label"], **style)
        low, high = ([m + sign * s for m, s in zip(mean, spread, strict=True)] for sign in (-1, 1))
        axis.fill_between(at, low, high, color=COLOURS[number], alpha=0.12, lw=0)
    if against == "round":
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.margins(x=0.03, y=0.1)


def _accuracy_axis(axis: Axes, summary: Summary) -> None:
    axis.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))
    if summary["majority_rate"] is not None:
        axis.axhline(summary["majority_rate"], color=GREY, lw=1.2, ls="--", label="most common answer")


def _label_lines(axis: Axes) -> None:
    """A legend beside the panel, in the order in which the lines end, so that the eye goes straight across."""
    lines = sorted(axis.get_lines(), key=lambda line: -line.get_ydata()[-1])
    _legend_beside(axis, lines, [line.get_label() for line in lines])


def _legend_beside(axis: Axes, handles: Sequence[Any], labels: Sequence[str]) -> None:
    place = {"loc": "center left", "bbox_to_anchor": (1.0, 0.5)}
    axis.legend(handles, labels, frameon=False, fontsize=8.5, labelcolor=DARK, **place)


def _rank_panels(shown: Sequence[dict[str, Any]]) -> tuple[Figure, list[tuple[Axes, Sequence[dict[str, Any]]]]]:
    """A figure with a panel for each group of variants that can be drawn together."""
    groups = panels_of(shown)
    figure, axes = _figure(len(groups), 7.2 if len(groups) == 1 else 5.4, 4.2)
    return figure, list(zip(axes, groups, strict=True))


def _accuracy_by_rank(summary: Summary) -> Figure | None:
    shown = [variant for variant in summary["variants"] if variant["mean_rank"] and variant["accuracy"]]
    if not shown:
        return None
    figure, panels = _rank_panels(shown)
    for axis, variants in panels:
        dress(axis, "Final accuracy of the global adapter", "mean rank of the run's clients")
        _plot_accuracies(axis, variants)
        _accuracy_axis(axis, summary)
        _legend_beside(axis, *axis.get_legend_handles_labels())
    return figure


def _plot_accuracies(axis: Axes, variants: Sequence[dict[str, Any]]) -> None:
    """A point for each; those of about the same rank stand side by side, not over one another."""
    ranks = [variant["mean_rank"]["mean"] for variant in variants]
    width = max(max(ranks) - min(ranks), 1.0) * 0.025
    for number, (variant, rank) in enumerate(zip(variants, ranks, strict=True)):
        near = [other for other, each in enumerate(ranks) if abs(each - rank) < width]
        at = rank + width * (near.index(number) - (len(near) - 1) / 2)
        value = variant["accuracy"]
        style = {"color": COLOURS[number], "fmt": MARKERS[number], "ms": 6, "capsize": 3, "label": variant["label"]}
        axis.errorbar(at, value["mean"], value["spread"] or 0.0, **style)
    axis.margins(x=0.12, y=0.15)


def _loss_by_rank(summary: Summary) -> Figure | None:
    shown = [variant for variant in summary["variants"] if any(variant["rank_losses"].values())]
    if not shown:
        return None
    figure, panels = _rank_panels(shown)
    for axis, variants in panels:
        dress(axis, "Clients' training loss, second half of the rounds", "rank of the client")
        for number, variant in enumerate(variants):
            points = sorted((int(rank), value["mean"]) for rank, value in variant["rank_losses"].items() if value)
            style = {"color": COLOURS[number], "marker": MARKERS[number], "ms": 5, "lw": 1.2}
            axis.plot(*zip(*points, strict=True), label=variant["label"], **style)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.margins(x=0.05, y=0.1)
        _label_lines(axis)
    return figure


def _data_split(summary: Summary) -> Figure | None:
    """Stacked bars, a client each, the tasks as colours; a panel for each seed and way to split."""
    splits = summary["splits"]
    if not splits:
        return None
    figure, axes = _figure(len(splits), 6.0, 3.4)
    for axis, split in zip(axes, splits, strict=True):
        dress(axis, split["name"], "client")
        axis.set_title(split["name"], loc="left", fontsize=9.5, color=DARK)
        axis.set_ylabel("rows", color=DARK)
        clients, base = range(len(split["counts"])), [0] * len(split["counts"])
        for number, task in enumerate(split["tasks"]):
            heights = [counts[number] for counts in split["counts"]]
            hatch = None if number < len(COLOURS) else "///"
            colour = COLOURS[number % len(COLOURS)]
            axis.bar(clients, heights, bottom=base, color=colour, hatch=hatch, width=0.85, label=task)
            base = [before + height for before, height in zip(base, heights, strict=True)]
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    # Every panel has the same tasks, since the rows are the same.
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", frameon=False, fontsize=8.5, labelcolor=DARK)
    return figure


def _ranks(summary: Summary) -> Figure | None:
    """How many clients have which rank: a panel for each different deal of ranks, named by the runs that have it."""
    deals: dict[tuple[int, ...], list[str]] = {}
    labels = {run["name"]: variant["label"] for variant in summary["variants"] for run in variant["runs"]}
    for split in summary["splits"]:
        for run, ranks in split["ranks"].items():
            if run in labels:
                deals.setdefault(tuple(ranks), []).append(run)
    if not deals:
        return None
    shown = list(deals.items())
    figure, axes = _figure(len(shown), 4.4, 3.0)
    top = max(max(ranks) for ranks, _ in shown)
    for axis, (ranks, runs) in zip(axes, shown, strict=True):
        counts = {rank: ranks.count(rank) for rank in sorted(set(ranks))}
        dress(axis, _told_runs(runs), f"rank (mean {sum(ranks) / len(ranks):.3g} over {len(ranks)} clients)")
        axis.set_title(_told_runs(runs), loc="left", fontsize=9.5, color=DARK)
        colours = [RANK_COLOURS((rank - 1) / max(1, top - 1)) for rank in counts]
        axis.bar(list(counts), list(counts.values()), color=colours, width=0.85)
        axis.set_xlim(0.2, top + 0.8)
        axis.set_ylabel("clients", color=DARK)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.yaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def _told_runs(runs: Sequence[str]) -> str:
    return runs[0] if len(runs) == 1 else f"{runs[0]} and {len(runs) - 1} more"
