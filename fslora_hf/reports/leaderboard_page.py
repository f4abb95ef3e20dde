"""A leaderboard as one HTML page that needs no network: style, script and numbers are in it."""

from pathlib import Path
from typing import Any

from .html import fill_page
from .leaderboard import HasError, Leaderboard, Row
from .leaderboard_tables import MARK, METRIC_NAMES, to_text

TEMPLATE = Path(__file__).with_name("leaderboard.html")


def to_html(leaderboard: Leaderboard, title: str = "Leaderboard") -> str:
    """The page's text; it works from a file, and its policy forbids the browser to load anything.

    Sorting, the choice of tasks and the search run in the page; without scripts it shows the text table.
    """
    return fill_page(
        TEMPLATE,
        mark=MARK,
        title=title,
        metric=METRIC_NAMES[leaderboard.metric],
        text=to_text(leaderboard),
        data=payload(leaderboard),
    )


def payload(leaderboard: Leaderboard) -> dict[str, Any]:
    """What the page's script shows: shares of 1, per task, so that it can average over any choice of tasks."""
    return {
        "metric": METRIC_NAMES[leaderboard.metric],
        "tasks": leaderboard.tasks,
        "ranked_tasks": leaderboard.ranked_tasks,
        "majority_rates": leaderboard.majority_rates,
        "reference": leaderboard.reference.name,
        "notes": leaderboard.notes,
        "rows": [_row(row) for row in leaderboard.rows],
    }


def _row(row: Row) -> dict[str, Any]:
    return {
        "name": row.name,
        "protocol": row.entry.protocol,
        "reference": row.is_reference,
        "notes": row.notes,
        "scores": {task: [*_pair(score), score.rows] for task, score in row.scores.items()},
        "paired": {task: _pair(paired) for task, paired in row.paired.items()},
        "details": _details(row),
    }


def _pair(estimate: HasError) -> list[float]:
    return [estimate.value, estimate.standard_error]


def _details(row: Row) -> list[tuple[str, str]]:
    """Label and text of everything that tells how an entry came about."""
    entry = row.entry
    labelled = {
        "model": entry.model,
        "adapter": entry.adapter or {"name": "none"},
        "settings": entry.settings,
        "versions": entry.versions,
    }
    texts = {label: _listing(values) for label, values in labelled.items()}
    texts["prompt hash"], texts["rows hash"] = entry.prompt_hash, entry.rows_hash
    texts["seed"], texts["finished"], texts["file"] = str(entry.seed), entry.time, entry.source
    return [("protocol", entry.protocol), *((label, text) for label, text in texts.items() if text)]


def _listing(values: dict[str, Any]) -> str:
    """`{"name": "a", "revision": None, "round": 3}` as `a, round 3`."""
    parts = [str(value) if key == "name" else f"{key} {value}" for key, value in values.items() if value is not None]
    return ", ".join(parts)
