"""Pieces of Markdown. Names, paths and commands are the user's: each is escaped for the place it stands in."""

import html
import re
from typing import Any

from ..common.foreign_text import LONGEST, foreign_text
from ..common.masking import scrub, scrub_quoted


def one_line(text: Any, longest: int = LONGEST) -> str:
    """Printable text without line breaks, at most so many characters."""
    return foreign_text(text, longest)


def without_tokens(command: str) -> str:
    """A command line with the variable HF_TOKEN in place of every token."""
    return scrub_quoted(command, "$HF_TOKEN")


def escape_markdown(text: str) -> str:
    """Text that stays text in a cell of a Markdown table."""
    return re.sub(r"([\\`*_\[\]|~])", r"\\\1", html.escape(text, quote=False))


def plain(text: Any, longest: int = LONGEST) -> str:
    """Text of the user's, or of others, that stays text in a line or a cell, and holds no token."""
    return escape_markdown(scrub(one_line(text, longest)))


def fenced(code: str, language: str) -> str:
    """A code block, whatever backticks it holds."""
    code = code.strip("\n").replace("<!-- fslora_hf:", "<!-- fslora_hf :")  # no line of it may pass for a marker
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", code)), default=0))
    return f"{fence}{language}\n{code}\n{fence}"


def percent(share: float) -> str:
    return f"{100 * share:.1f}"


def count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def size(number: int) -> str:
    """Bytes in a unit that keeps the figure short."""
    unit, factor = ("GB", 10**9) if number >= 10**9 else ("MB", 10**6) if number >= 10**6 else ("kB", 10**3)
    return f"{number / factor:,.{1 if number >= 10 * factor else 2}f} {unit}"


def duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 6000 else f"{seconds / 3600:.1f} hours"
