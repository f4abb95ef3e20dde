"""The commonsense tasks as prompt/completion rows: from published files, or a miniature set that needs none."""

from .commonsense import TASKS, load_commonsense
from .miniature import load_miniature
from .prompts import completions, options, render_completion, render_prompt

__all__ = [
    "TASKS",
    "completions",
    "load_commonsense",
    "load_miniature",
    "options",
    "render_completion",
    "render_prompt",
]
