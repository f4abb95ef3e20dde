"""A comparison as a table: text for a terminal, Markdown, and the cells that the page takes."""

from typing import Any

from ..reports.markdown import escape_markdown
from ..reports.student import quantile, reach
from ..reports.tables import as_markdown, as_text

# Heading, key of a variant, factor and digits; a difference is looked up under "difference".
_COLUMNS = (
    ("accuracy, %", "accuracy", 100, 2),
    ("difference, points [95 %]", "difference accuracy", 100, 2),
    ("loss", "loss", 1, 4),
    ("difference of loss [95 %]", "difference loss", 1, 4),
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
    """`mean ± spread`, the spread left out where there is none, and of a difference the interval of its mean."""
    is_difference = key.startswith("difference ")
    if is_difference and variant["reference"] is None:
        return "reference"
    value = variant["difference"][key.split()[1]] if is_difference else variant[key]
    if value is None:
        return "-"
    form = f"{'+' if is_difference else ''}.{digits}f"
    mean = f"{factor * value['mean']:{form}}"
    if value["spread"] is None:
        return f"{mean} (n=1)"
    text = f"{mean} ± {factor * value['spread']:.{digits}f}"
    if not is_difference:
        return text
    off = reach(value["spread"], value["n"])
    low, high = (factor * (value["mean"] + each) for each in (-off, off))
    return f"{text} [{low:{form}}, {high:{form}}]"


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
        lines += _intervals_told(summary)
    if summary["majority_rate"] is not None:
        lines.append(f"Always giving a task's most common answer would reach {100 * summary['majority_rate']:.2f} %.")
    return [*lines, *summary["notes"]]


def _intervals_told(summary: dict[str, Any]) -> list[str]:
    """What the intervals of differences are, if there are any."""
    values = [value for variant in summary["variants"] for value in variant["difference"].values() if value]
    seeds = sorted({value["n"] for value in values if value["spread"] is not None})
    if not seeds:
        return []
    times = ", ".join(f"{quantile(n - 1):.3g} for {n} seeds" for n in seeds)
    return [
        "In brackets: the 95 % confidence interval of a mean difference by Student's t (spread / root of the number "
        f"of seeds, times {times}); it takes differences of seeds for normal, and one that holds 0 may be chance."
    ]


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
