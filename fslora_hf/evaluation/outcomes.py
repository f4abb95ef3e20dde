"""What an evaluation found: one outcome a question, and the scores computed from them by the project's metric."""

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from ..data.prompts import RESPONSE_MARK
from ..data.templates import TEMPLATES
from .metric import first_answer, load_metric

# What a record of an outcome holds beside the fields that every protocol fills.
_ALWAYS = ("question", "task", "answer", "options", "choice")


@dataclass(frozen=True)
class Outcome:
    """One question and what the model made of it.

    `choice` is None if there is no usable one: a log-likelihood that is not a number, or a text that names no answer.
    The question then counts as wrong.
    """

    question: str  # identifies the question by its text, 16 hexadecimal digits
    task: str
    answer: str
    options: tuple[str, ...]
    choice: str | None
    log_likelihoods: tuple[float, ...] | None = None  # nats, one for each option
    choice_norm: str | None = None  # by log-likelihood per character
    text: str | None = None  # what was generated
    finite: bool = True  # False: the model computed something that is not a number

    @property
    def correct(self) -> bool:
        return self.choice == self.answer

    def to_record(self) -> dict[str, Any]:
        """Plain JSON values; a log-likelihood that is not finite becomes null."""
        record = {name: getattr(self, name) for name in _ALWAYS} | {"correct": self.correct}
        if self.log_likelihoods is not None:
            numbers = [value if math.isfinite(value) else None for value in self.log_likelihoods]
            record |= {"choice_norm": self.choice_norm, "log_likelihoods": numbers}
        if self.text is not None:
            record["text"] = self.text
        return record | ({} if self.finite else {"finite": False})

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> "Outcome":
        values = {each.name: record[each.name] for each in fields(cls) if each.name in record}
        if "log_likelihoods" in values:
            values["log_likelihoods"] = tuple(math.nan if x is None else x for x in values["log_likelihoods"])
        return cls(**values | {"options": tuple(record["options"])})


@dataclass(frozen=True)
class TaskScore:
    """Accuracy on one task beside what answering always the same would reach; shares of 1, and counts of questions."""

    accuracy: float
    standard_error: float
    majority_rate: float
    format_validity: float  # share of questions with a usable choice
    rows: int
    invalid: int  # questions without one


@dataclass(frozen=True)
class Scores:
    """Outcomes in the rows' order, and what the metric `commonsense_qa` makes of them.

    `metrics` holds its result for `accuracy`, and for `accuracy_norm` where options were scored.
    """

    protocol: str
    outcomes: list[Outcome]
    metrics: dict[str, dict[str, Any]]
    resumed: int = 0  # questions that an earlier, killed attempt had finished

    @property
    def tied(self) -> int:
        """Questions whose best option has an equal: the first was chosen, which half precision makes frequent."""
        return sum(
            outcome.finite and sorted(outcome.log_likelihoods)[-1] == sorted(outcome.log_likelihoods)[-2]
            for outcome in self.outcomes
            if outcome.log_likelihoods is not None
        )

    @property
    def tasks(self) -> dict[str, TaskScore]:
        """By name, in the order of first appearance."""
        found = self.metrics["accuracy"]["tasks"]
        return {
            task: TaskScore(**{each.name: score[each.name] for each in fields(TaskScore)})
            for task, score in found.items()
        }

    @property
    def not_finite(self) -> int:
        """Questions in which the model computed something that is not a number."""
        return sum(not outcome.finite for outcome in self.outcomes)

    def table(self) -> list[dict[str, Any]]:
        """One line for every task and metric and for the average over tasks, as result files list them."""
        lines = []
        for name, result in self.metrics.items():
            lines += [_line(task, name, "accuracy", score) for task, score in result["tasks"].items()]
            lines.append(_line("average", name, "accuracy", result))
        result = self.metrics["accuracy"]
        for task, score in [*result["tasks"].items(), ("average", result)]:
            lines.append(_line(task, "format_validity", "format_validity", score))
        return lines


def _line(task: str, metric: str, key: str, score: Mapping[str, Any]) -> dict[str, Any]:
    error = "standard_error" if key == "accuracy" else "format_validity_standard_error"
    return {
        "task": task,
        "metric": metric,
        "value": score[key],
        "standard_error": score[error],
        "rows": score["rows"],
        "majority_rate": score["majority_rate"],
    }


def summarise(protocol: str, outcomes: Sequence[Outcome]) -> Scores:
    """The scores of some outcomes of one protocol."""
    outcomes = list(outcomes)
    by_text = all(outcome.text is not None for outcome in outcomes)
    if by_text:
        metrics = {"accuracy": _judge_texts(outcomes)}
    else:
        choices = {"accuracy": "choice", "accuracy_norm": "choice_norm"}
        metrics = {metric: _judge_choices(outcomes, name) for metric, name in choices.items()}
    return Scores(protocol, outcomes, metrics)


def _judge_choices(outcomes: Sequence[Outcome], name: str) -> dict[str, Any]:
    choices = [getattr(outcome, name) for outcome in outcomes]
    return load_metric().compute(
        predictions=[-1 if c is None else o.options.index(c) for c, o in zip(choices, outcomes, strict=True)],
        references=[outcome.options.index(outcome.answer) for outcome in outcomes],
        task=[outcome.task for outcome in outcomes],
    )


def _judge_texts(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    return load_metric().compute(
        predictions=[RESPONSE_MARK + outcome.text for outcome in outcomes],
        references=[outcome.answer for outcome in outcomes],
        task=[outcome.task for outcome in outcomes],
        answers=own_answers((outcome.task, outcome.options) for outcome in outcomes),
    )


def own_answers(questions: Iterable[tuple[str, Sequence[str]]]) -> dict[str, list[str]]:
    """What may be answered in tasks that are not the benchmark's: all options of a task's questions."""
    answers: dict[str, list[str]] = {}
    for task, options in questions:
        if task not in TEMPLATES:
            names = answers.setdefault(task, [])
            names += [name for name in options if name not in names]
    return answers


def read_answer(response: str, task: str, answers: Mapping[str, Sequence[str]]) -> str | None:
    """The answer of its task that a response names first, or None; `answers` as of `own_answers`.

    The mark stands in front, as in the whole text, so that a second one ends the response.
    """
    return first_answer(RESPONSE_MARK + response, task, answers.get(task))


def question_id(row: Mapping[str, str]) -> str:
    """What identifies a question wherever it is asked: a hash of its task and its prompt."""
    return short_hash(row["task"], row["prompt"])


def short_hash(*texts: str) -> str:
    """16 hexadecimal digits of the SHA-256 of some texts, told apart by their lengths."""
    digest = hashlib.sha256()
    for text in texts:
        encoded = text.encode()
        digest.update(len(encoded).to_bytes(8, "little") + encoded)
    return digest.hexdigest()[:16]


def rows_hash(rows: Iterable[Mapping[str, str]]) -> str:
    """Of the questions that are asked and their right answers, in order."""
    return short_hash(*(text for row in rows for text in (question_id(row), row["completion"], row["answer"])))
