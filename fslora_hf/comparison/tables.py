"""A comparison as a table: text for a terminal, Markdown, and the cells that the page takes."""

from typing import Any

from ..reports.markdown import escape_markdown
from ..reports.tables import as_markdown, as_text

# Heading, key of a variant, factor and digits; a difference is looked up under "difference".
_COLUMNS = (
    ("accuracy, %", "accuracy", 100, 2),
    ("difference, points", "difference accuracy", 100, 2),
    ("loss", "loss", 1, 4),
    ("difference of loss", "difference loss", 1, 4),
    ("rounds", "rounds", 1, 0),
    ("MB up", "megabytes_up", 1, 2),
    ("MB down", "megabytes_down", 1, 2),
    ("seconds", "seconds", 1, 0),
)


def grid(summary: dict[str, Any]) -> list[list[str]]:
    """Header and a line for each variant, as texts."""
    lines = [
        [variant["label"], *(_cell(variant, *column[1:]) for column in _COLUMNS)] for variant in summary["variants"]
    ]
    return [
        ["", *(column[0] for column in _COLUMNS), "seeds"],
        *([*line, str(len(variant["runs"]))] for line, variant in zip(lines, summary["variants"], strict=True)),
    ]


def _cell(variant: dict[str, Any], key: str, factor: int, digits: int) -> str:
    """`mean ± spread`, the spread left out where there is none."""
    is_difference = key.startswith("difference ")
    if is_difference and variant["reference"] is None:
        return "reference"
    value = variant["difference"][key.split()[1]] if is_difference else variant[key]
    if value is None:
        return "-"
    mean = f"{factor * value['mean']:{'+' if is_difference else ''}.{digits}f}"
    return f"{mean} (n=1)" if value["spread"] is None else f"{mean} ± {factor * value['spread']:.{digits}f}"


def captions(summary: dict[str, Any]) -> list[str]:
    """What the columns mean, and what must be known before reading them."""
    references = list(dict.fromkeys(variant["reference"] for variant in summary["variants"] if variant["reference"]))
    lines = [
        "Mean over seeds ± the sample's standard deviation over seeds (not of the mean), n=1 where one seed is all "
        "there is. Accuracy is the mean over tasks, and loss, in nats a token, that of the global adapter on held-out "
        "rows after the last round.",
        budget_told(summary["budget"]),
        "MB are 10**6 bytes, summed over clients and rounds; seconds are those of the rounds, evaluations aside.",
    ]
    if references:
        lines.append(
            f"Differences are to {' and '.join(references)}, taken within a seed (same rows and clients), then "
            "averaged; their spread is that of the differences."
        )
    if summary["majority_rate"] is not None:
        lines.append(f"Always giving a task's most common answer would reach {100 * summary['majority_rate']:.2f} %.")
    return [*lines, *summary["notes"]]


def budget_told(budget: dict[str, Any]) -> str:
    if budget.get("rounds") is not None:
        return f"Equal rounds: {budget['rounds']} for every run."
    return (
        f"Equal bytes: every run ended after the round in which its clients' uploads reached "
        f"{budget['upload_megabytes']:g} MB."
    )


def to_text(summary: dict[str, Any]) -> str:
    """A table for a terminal, with its captions below."""
    lines = as_text(grid(summary), left=(0,))
    return "\n".join([summary["title"], "", lines[0], "-" * len(lines[0]), *lines[1:], "", *captions(summary)])


def to_markdown(summary: dict[str, Any]) -> str:
    """The table alone, as GitHub and the Hub render it."""
    return as_markdown([escape_markdown(cell) for cell in line] for line in grid(summary))
