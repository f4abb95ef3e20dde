"""The commonsense tasks as prompt/completion rows: published files, the originals on the Hub, or a miniature set."""

from .commonsense import TASKS, load_commonsense
from .miniature import load_miniature
from .originals import load_originals
from .prompts import completions, options, render_completion, render_prompt

__all__ = [
    "TASKS",
    "completions",
    "load_commonsense",
    "load_miniature",
    "load_originals",
    "options",
    "render_completion",
    "render_prompt",
]
