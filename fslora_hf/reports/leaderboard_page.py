"""A leaderboard as one HTML page that needs no network: style, script and numbers are in it."""

import base64
import hashlib
import html
import json
import re
from pathlib import Path
from typing import Any

from .leaderboard import HasError, Leaderboard, Row
from .leaderboard_tables import MARK, METRIC_NAMES, to_text

TEMPLATE = Path(__file__).with_name("leaderboard.html")


def to_html(leaderboard: Leaderboard, title: str = "Leaderboard") -> str:
    """The page's text; it works from a file, and its policy forbids the browser to load anything.

    Sorting, the choice of tasks and the search run in the page; without scripts it shows the text table.
    """
    template = TEMPLATE.read_text(encoding="utf-8")
    fill = {
        "policy": policy(template),
        "mark": MARK,
        "title": html.escape(title),
        "metric": METRIC_NAMES[leaderboard.metric],
        "text": html.escape(to_text(leaderboard)),
        "data": _json_in_html(payload(leaderboard)),
    }
    # In one pass, so that no value is searched for places to fill.
    return re.sub(r"\{\{(\w+)\}\}", lambda place: fill[place[1]], template)


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


def _json_in_html(value: Any) -> str:
    """JSON that cannot end the script element it stands in."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def policy(template: str) -> str:
    """A Content-Security-Policy under which the page's own style and script run, and nothing is fetched."""
    style, script = (
        " ".join(f"'sha256-{_digest(text)}'" for text in re.findall(rf"<{tag}>(.*?)</{tag}>", template, re.DOTALL))
        for tag in ("style", "script")
    )
    return f"default-src 'none'; style-src {style}; script-src {script}; base-uri 'none'; form-action 'none'"


def _digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
