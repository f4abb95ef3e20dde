"""A table and a figure of several result files of one run or one base."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from ..common.foreign_text import foreign_text
from ..storage.files import whole_file
from .markdown import percent
from .style import ACCENT, DARK, GREY
from .tables import as_markdown


def results_table(results: Sequence[dict[str, Any]]) -> str:
    """A Markdown table: a line for each result, accuracies in percent with their standard errors, and below them what
    always giving the most common answer would reach."""
    tasks = _tasks(results[0])
    header = ["", *map(_cell, tasks), "average", "average per character", "usable answers"]
    lines = [[_cell(result["name"]), *_cells(result, tasks)] for result in results]
    majority = [percent(_score(results[0], task, "accuracy")["majority_rate"]) for task in [*tasks, "average"]]
    rows = [f"{_score(results[0], task, 'accuracy')['rows']:,}" for task in [*tasks, "average"]]
    lines += [["most common answer", *majority, "", ""], ["questions", *rows, "", ""]]
    if all(line[-2] == "" for line in lines):  # no options were scored
        header, *lines = ([*line[:-2], line[-1]] for line in [header, *lines])
    return "\n".join([as_markdown([header, *lines], padded=True), *_remarks(results)])


def plot_accuracy(results: Sequence[dict[str, Any]], folder: str | Path) -> Path:
    """Write `accuracy_by_round.<protocol>.png`: a panel for each task and one for their average, with standard errors
    and the rate of the most common answer. A result without an adapter stands at round 0. Returns the path."""
    points = sorted(results, key=round_number)
    panels = [*_tasks(points[0]), "average"]
    columns = min(3, len(panels))
    height = -(-len(panels) // columns)
    figure = Figure(figsize=(3.6 * columns, 2.5 * height + 0.4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(height, columns, squeeze=False).flatten()
    for axis, task in zip(axes, panels, strict=False):
        scores = [_score(result, task, "accuracy") for result in points]
        values, errors = ([score[key] for score in scores] for key in ("value", "standard_error"))
        axis.axhline(scores[0]["majority_rate"], color=GREY, lw=1.2, ls="--", label="most common answer")
        at = [round_number(result) for result in points]
        axis.errorbar(at, values, errors, fmt="o-", color=ACCENT, ms=4, capsize=2)
        title = f"{foreign_text(task)} ({scores[0]['rows']:,})"
        axis.set_title(title, loc="left", fontsize=10, color=DARK, parse_math=False)
        axis.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8, colors=DARK)
        axis.margins(y=0.2)
    for axis in axes[len(panels) :]:
        axis.remove()
    axes[0].legend(frameon=False, fontsize=8, labelcolor=DARK)
    figure.supxlabel("rounds finished", fontsize=9, color=DARK)
    figure.suptitle(f"Accuracy by round, {points[0]['protocol']}", x=0.01, ha="left", fontsize=12, color=DARK)
    path = Path(folder) / f"accuracy_by_round.{points[0]['protocol']}.png"
    with whole_file(path) as file:
        figure.savefig(file, format="png")
    return path


def _tasks(result: dict[str, Any]) -> list[str]:
    return [line["task"] for line in result["scores"] if line["metric"] == "accuracy" and line["task"] != "average"]


def _score(result: dict[str, Any], task: str, metric: str) -> dict[str, Any] | None:
    return next((line for line in result["scores"] if (line["task"], line["metric"]) == (task, metric)), None)


def _cell(name: str) -> str:
    """A name that stays within its cell."""
    return foreign_text(name).replace("|", "\\|")


def _cells(result: dict[str, Any], tasks: Sequence[str]) -> list[str]:
    scores = [_score(result, task, "accuracy") for task in [*tasks, "average"]]
    scores += [_score(result, "average", "accuracy_norm")]
    cells = ["" if s is None else f"{100 * s['value']:.1f} ± {100 * s['standard_error']:.1f}" for s in scores]
    return [*cells, percent(_score(result, "average", "format_validity")["value"])]


def _remarks(results: Sequence[dict[str, Any]]) -> list[str]:
    """What a reader must know of questions that were not decided as they should be."""
    texts = {
        "not_finite": "the model computed something that is not a number; they count as wrong",
        "tied": "the best options are equally likely, and the first was chosen",
    }
    found = [(key, r) for key in texts for r in results if r.get(key)]
    lines = [f"{foreign_text(r['name'])}: in {r[key]:,} questions {texts[key]}." for key, r in found]
    return ["", *lines] if lines else []


def round_number(result: dict[str, Any]) -> int:
    """The rounds that a result's adapter was trained for; 0 without an adapter."""
    return 0 if result["adapter"] is None else result["adapter"]["round"] or 0
