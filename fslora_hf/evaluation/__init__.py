"""Scoring of a language model on question-answering rows."""

from importlib import import_module

_HOMES = {
    "PROTOCOLS": "..storage.result_files",
    "Generate": ".generation",
    "Loglikelihood": ".loglikelihood",
    "Losses": ".loglikelihood",
    "Outcome": ".outcomes",
    "Scores": ".outcomes",
    "TaskScore": ".outcomes",
    "held_out_loss": ".loglikelihood",
    "make_protocol": ".runner",
    "score_rows": ".runner",
}
__all__ = list(_HOMES)


def __getattr__(name: str):
    """Load a public name when it is first asked for, so that ranking and pushing results do not wait for torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name], __name__), name)
