"""Scoring of a language model on question-answering rows."""

from .scoring import (
    Losses,
    Outcome,
    Scores,
    TaskScore,
    answer_losses,
    held_out_loss,
    majority_rate,
    score_options,
    standard_error,
)

__all__ = [
    "Losses",
    "Outcome",
    "Scores",
    "TaskScore",
    "answer_losses",
    "held_out_loss",
    "majority_rate",
    "score_options",
    "standard_error",
]
