"""Results files of evaluations, read and checked: what a leaderboard ranks.

One evaluation is `<name>.results.json` with its scores, beside `<name>.outcomes.jsonl` with one line a question.
"""

import json
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any

from ..common.foreign_text import LONGEST_TASK, foreign_fields, foreign_names, foreign_text
from ..common.settings import did_you_mean, is_a, sentence
from ..storage.result_files import FORMAT, PROTOCOLS, RESULTS

METRICS = ("accuracy", "accuracy_norm", "format_validity")
AVERAGE = "average"  # stands in place of a task in the scores
MOST_SCORES = 1000  # of one evaluation, each task and metric one

_FIELDS = {
    "name": (str,),
    "protocol": (str,),
    "prompt_hash": (str,),
    "rows_hash": (str,),
    "model": (dict,),
    "adapter": (dict, NoneType),
    "settings": (dict,),
    "seed": (int,),
    "scores": (list,),
    "versions": (dict,),
    "time": (str,),
    "not_finite": (int,),
    "tied": (int,),
    "outcomes": (str,),
}
_SCORE_FIELDS = {
    "task": (str,),
    "metric": (str,),
    "value": (float,),
    "standard_error": (float,),
    "rows": (int,),
    "majority_rate": (float,),
}
_LINE_FIELDS = {
    "question": (str,),
    "task": (str,),
    "answer": (str,),
    "choice": (str, NoneType),
    "correct": (bool,),
    "choice_norm": (str, NoneType),
}
_KINDS = {
    str: "a text",
    dict: "an object",
    list: "a list",
    int: "an integer",
    float: "a number",
    bool: "true or false",
}
_REMEDY = "give the file as the evaluation wrote it, or evaluate anew"


@dataclass(frozen=True)
class Score:
    """One metric on one task, as shares of 1."""

    value: float
    standard_error: float
    rows: int
    majority_rate: float


@dataclass(frozen=True)
class Answers:
    """What became of the questions of one task, in the file's order.

    `questions` are ids; the second of equal questions has `#1` appended, the third `#2`. `right[metric][i]` is whether
    question i counts under that metric.
    """

    questions: tuple[str, ...]
    right: dict[str, tuple[bool, ...]]


@dataclass(frozen=True)
class Entry:
    """One evaluation.

    Args:
        source: where it was read, for people: a path, or an address and a revision.
        scores: by metric, then by task; the average is left out.
        answers: by task, None without an outcomes file.
        not_finite, tied: questions that were not decided by the model, as result files count them.
    """

    source: str
    name: str
    protocol: str
    prompt_hash: str
    rows_hash: str
    model: dict[str, Any]
    adapter: dict[str, Any] | None
    settings: dict[str, Any]
    seed: int
    versions: dict[str, Any]
    time: str
    scores: dict[str, dict[str, Score]]
    answers: dict[str, Answers] | None
    not_finite: int = 0
    tied: int = 0


def read_results(paths: Iterable[str | Path]) -> list[Entry]:
    """The results files at `paths`: files, and folders that are searched for `*.results.json` at any depth.

    A file that is named twice counts once. A missing outcomes file leaves `answers` None.

    Raises:
        FileNotFoundError: a path names nothing, or a folder holds no results file.
        ValueError: a file is damaged or something else.
    """
    found: dict[Path, Path] = {}
    for path in paths:
        for file in _files(Path(path)):
            found.setdefault(file.resolve(), file)
    return [_read(file) for file in found.values()]


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    files = sorted(path.rglob(f"*{RESULTS}")) if path.is_dir() else []
    if odd := [file for file in files if not file.as_posix().isprintable()]:
        raise ValueError(f"Expected printable names of files in {foreign_text(path)}, found {foreign_names(odd)}: "
                         "rename them.")  # fmt: skip
    if not files:
        found = "a folder without one" if path.is_dir() else "nothing"
        raise FileNotFoundError(
            f"Expected results files (*{RESULTS}) at {path}, found {found}: name the output of an evaluation."
        )
    return files


def _read(path: Path) -> Entry:
    results = _text(path)
    outcomes = path.with_name(_parse_results(results, path.as_posix())["outcomes"])
    return parse_entry(results, _text(outcomes) if outcomes.is_file() else None, path.as_posix())


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"Expected UTF-8 text in {path}, found byte {error.start} to be none: {_REMEDY}.") from error


def parse_entry(results: str, outcomes: str | None, source: str) -> Entry:
    """An entry from the texts of a results file and of its outcomes file, wherever they come from.

    Raises:
        ValueError: either is not what an evaluation writes, or they contradict each other.
    """
    fields = _parse_results(results, source)
    if len(fields["scores"]) > MOST_SCORES:
        raise ValueError(sentence(f"scores in {source}", f"at most {MOST_SCORES:,}", len(fields["scores"]), _REMEDY))
    scores: dict[str, dict[str, Score]] = {}
    for number, score in enumerate(fields["scores"]):
        where = f"scores[{number}]"
        _check_fields(score, _SCORE_FIELDS, where, source)
        _check_score(score, where, source)
        by_task = scores.setdefault(score["metric"], {})
        if score["task"] in by_task:
            raise ValueError(sentence(f"{where} in {source}", "of a task and metric of its own", score, _REMEDY))
        by_task[score["task"]] = Score(*(score[key] for key in ("value", "standard_error", "rows", "majority_rate")))
    for by_task in scores.values():
        by_task.pop(AVERAGE, None)
    scores = {metric: by_task for metric, by_task in scores.items() if by_task}
    if not scores:
        raise ValueError(sentence(f"scores in {source}", "the scores of one task or more", fields["scores"], _REMEDY))
    answers = None
    if outcomes is not None:
        answers = _parse_outcomes(outcomes, "accuracy_norm" in scores, f"{fields['outcomes']} of {source}")
        _check_agreement(scores, answers, source)
    kept = {key: fields[key] for key in _FIELDS if key not in ("scores", "outcomes")}
    texts = {key: foreign_text(value) for key, value in kept.items() if isinstance(value, str)}
    objects = {key: foreign_fields(value) for key, value in kept.items() if isinstance(value, dict)}
    return Entry(source=source, **kept | texts | objects, scores=scores, answers=answers)


def _parse_results(text: str, source: str) -> dict[str, Any]:
    fields = _json(text, source)
    if not isinstance(fields, dict) or "scores" not in fields or "format" not in fields:
        raise ValueError(sentence(source, 'a results file with "format" and "scores"', fields, _REMEDY))
    if fields["format"] != FORMAT:
        remedy = "read it with the fslora_hf that wrote it, or evaluate anew"
        raise ValueError(sentence(f"format in {source}", str(FORMAT), fields["format"], remedy))
    _check_fields(fields, _FIELDS, "", source)
    if fields["protocol"] not in PROTOCOLS:
        remedy = did_you_mean(fields["protocol"], PROTOCOLS)
        raise ValueError(
            sentence(f"protocol in {source}", f"one of {', '.join(PROTOCOLS)}", fields["protocol"], remedy)
        )
    _check_subject(fields, source)
    outcomes = fields["outcomes"]
    whole = outcomes.isprintable() and len(outcomes.encode()) <= 255
    if not outcomes or not whole or Path(outcomes).name != outcomes:
        raise ValueError(sentence(f"outcomes in {source}", "the name of a file beside it", outcomes, _REMEDY))
    return fields


def _check_subject(fields: dict[str, Any], source: str) -> None:
    """That what is told of model and adapter are texts, and the adapter's round is one."""
    for name in ("model", "adapter"):
        for key in ("name", "digest", "revision", "dtype", "quantization"):
            value = (fields[name] or {}).get(key)
            if value is not None and not isinstance(value, str):
                raise ValueError(sentence(f"{name}.{key} in {source}", "a text or null", value, _REMEDY))
    number = (fields["adapter"] or {}).get("round")
    if number is not None and not (is_a(number, int) and 0 <= number < 2**31):
        raise ValueError(sentence(f"adapter.round in {source}", "a number of rounds or null", number, _REMEDY))


def _json(text: str, source: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # a number of too many digits is a ValueError alone
        found = f"{text[:40]!r} ({foreign_text(error)})"
        raise ValueError(f"Expected JSON in {source}, found {found}: {_REMEDY}.") from error


def _check_fields(value: Any, fields: dict[str, tuple[type, ...]], where: str, source: str) -> None:
    """That `value` is an object with all `fields`, each of one of its types."""
    if not isinstance(value, dict):
        raise ValueError(sentence(f"{where} in {source}", "an object", value, _REMEDY))
    for key, kinds in fields.items():
        name = f"{where}.{key}" if where else key
        if key not in value:
            found = foreign_names(value)
            raise ValueError(f"Expected {name} in {source}, found only {found}: {_REMEDY}.")
        if not any(is_a(value[key], kind) for kind in kinds):
            expected = " or ".join(_KINDS.get(kind, "null") for kind in kinds)
            raise ValueError(sentence(f"{name} in {source}", expected, value[key], _REMEDY))
        if isinstance(value[key], int) and abs(value[key]) >= 2**63:
            raise ValueError(sentence(f"{name} in {source}", "a number below 2**63", value[key], _REMEDY))


def _check_score(score: dict[str, Any], where: str, source: str) -> None:
    if score["metric"] not in METRICS:
        remedy = did_you_mean(score["metric"], METRICS)
        expected = f"one of {', '.join(METRICS)}"
        raise ValueError(sentence(f"{where}.metric in {source}", expected, score["metric"], remedy))
    for key in ("value", "standard_error", "majority_rate"):
        if not 0 <= score[key] <= 1:  # not a number is not either
            raise ValueError(sentence(f"{where}.{key} in {source}", "a share between 0 and 1", score[key], _REMEDY))
    if not score["task"] or len(score["task"]) > LONGEST_TASK or not score["task"].isprintable():
        expected = f"a printable name of at most {LONGEST_TASK} characters"
        raise ValueError(sentence(f"{where}.task in {source}", expected, score["task"], _REMEDY))
    if score["rows"] < 1:
        raise ValueError(sentence(f"{where}.rows in {source}", "at least 1", score["rows"], _REMEDY))


def _parse_outcomes(text: str, has_norm: bool, source: str) -> dict[str, Answers]:
    wanted = {key: kinds for key, kinds in _LINE_FIELDS.items() if has_norm or key != "choice_norm"}
    lines: dict[str, list[dict[str, Any]]] = {}
    # Not splitlines(): a generated text may hold other line separators as they are.
    for number, raw in enumerate(text.removesuffix("\n").split("\n"), 1):
        line = _json(raw, f"line {number} of {source}")
        _check_fields(line, wanted, f"line {number}", source)
        lines.setdefault(line["task"], []).append(line)
    return {task: _answers(group, has_norm) for task, group in lines.items()}


def _answers(lines: list[dict[str, Any]], has_norm: bool) -> Answers:
    seen: Counter[str] = Counter()
    questions = []
    for line in lines:
        turn = seen[line["question"]]
        seen[line["question"]] += 1
        # Many files ask the same questions: one text serves all.
        questions.append(sys.intern(f"{line['question']}#{turn}" if turn else line["question"]))
    right = {
        "accuracy": tuple(line["correct"] for line in lines),
        "format_validity": tuple(line["choice"] is not None for line in lines),
    }
    if has_norm:
        right["accuracy_norm"] = tuple(line["choice_norm"] == line["answer"] for line in lines)
    return Answers(tuple(questions), right)


def _check_agreement(scores: dict[str, dict[str, Score]], answers: dict[str, Answers], source: str) -> None:
    """That the scores are those of the outcomes: a pair of files that was mixed up would give false differences."""
    for metric, by_task in scores.items():
        for task, score in by_task.items():
            marks = answers[task].right[metric] if task in answers else ()
            if len(marks) != score.rows or abs(sum(marks) - score.value * score.rows) > 0.5:
                raise ValueError(
                    f"Expected the outcomes of {source} to give {metric} {score.value:.4g} on {score.rows} questions "
                    f"of {task}, found {sum(marks)} right of {len(marks)}: keep an evaluation's two files together."
                )
