"""Scoring of a language model on question-answering rows."""

from .generation import Generate
from .loglikelihood import Loglikelihood, Losses, held_out_loss
from .outcomes import Outcome, Scores, TaskScore
from .results import PROTOCOLS
from .runner import make_protocol, score_rows

__all__ = [
    "PROTOCOLS",
    "Generate",
    "Loglikelihood",
    "Losses",
    "Outcome",
    "Scores",
    "TaskScore",
    "held_out_loss",
    "make_protocol",
    "score_rows",
]
