"""The report of a comparison: all its files, the Markdown text, and one HTML page that needs no network."""

import base64
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..reports.html import fill_page
from ..reports.markdown import escape_markdown
from ..storage.files import write_text
from .figures import draw_all
from .tables import budget_told, captions, grid, to_markdown, to_text

TEMPLATE = Path(__file__).with_name("page.html")


def write_report(summary: dict[str, Any], folder: str | Path) -> list[Path]:
    """Write the numbers, the tables, the figures and the two reports into `folder`; returns their paths."""
    folder = Path(folder)
    figures = draw_all(summary, folder)
    texts = {
        "comparison.json": json.dumps(summary, indent=1, allow_nan=False),
        "table.txt": to_text(summary),
        "table.md": to_markdown(summary),
        "report.md": to_report(summary, figures),
        "index.html": to_html(summary, figures, folder),
    }
    for name, text in texts.items():
        write_text(folder / name, f"{text}\n")
    drawn = [folder / f"{name}.{kind}" for name, _ in figures for kind in ("png", "svg")]
    return [*(folder / name for name in texts), *drawn]


def to_report(summary: dict[str, Any], figures: Sequence[tuple[str, str]]) -> str:
    """The report as Markdown, its figures beside it."""
    notes = "\n".join(f"- {escape_markdown(caption)}" for caption in captions(summary))
    images = "\n\n".join(f"## {caption}\n\n![{caption}]({name}.png)" for name, caption in figures)
    runs = "\n".join(f"- `{run['name']}`" for variant in summary["variants"] for run in variant["runs"])
    return (
        f"# {escape_markdown(summary['title'])}\n\n{to_markdown(summary)}\n\n{notes}\n\n{images}\n\n## Runs\n\n"
        f"Each has its settings in `recipes/`, what it left in `runs/` and what it printed in `logs/`.\n\n{runs}"
    )


def to_html(summary: dict[str, Any], figures: Sequence[tuple[str, str]], folder: Path) -> str:
    """The report as a page that works from a file; its policy forbids the browser to load anything."""
    return fill_page(
        TEMPLATE,
        title=summary["title"],
        budget=budget_told(summary["budget"]),
        runs=sum(len(variant["runs"]) for variant in summary["variants"]),
        table=grid(summary),
        captions=captions(summary),
        figures=[(_encoded(folder / f"{name}.svg"), caption) for name, caption in figures],
    )


def _encoded(path: Path) -> str:
    """The bytes of an image, which are in the page, in base64."""
    return base64.b64encode(path.read_bytes()).decode()
