"""The commonsense benchmark from its originals on the Hub, turned into the rows of the published layout.

Two of the originals (PIQA, SocialIQA) are loading scripts, which `datasets` no longer runs; their rows come from
parquet copies. Where the labels of a test set are not public, the validation split stands for the test split, as in
the published files.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

from datasets import ClassLabel, Dataset, List, Value, load_dataset

from ..common.foreign_text import LONGEST_REASON, foreign_text
from ..common.masking import scrub
from .commonsense import check_limit, check_split, check_tasks, draw_rows, render_row, to_dataset
from .templates import published_row

Row = Mapping[str, Any]
_LABEL = ("text", "integer", "class label")  # how copies of one data set store a label differs
_REMEDY = "the data set is no longer what it was, so give data_dir a folder of the published files"


@dataclass(frozen=True)
class Original:
    """Where a task's rows are and which of their fields hold what.

    The published row's question is `question` filled with the row's fields. What the field `answer` holds is one of
    `labels`, which stand for `choices` in order. `schema` describes the fields that are used, whatever others there
    are; `test` is the split with labels that training does not see.
    """

    repository: str
    question: str
    choices: Callable[[Row], Sequence[str] | None]
    labels: Callable[[Row], Sequence[str] | None]
    answer: str
    schema: Mapping[str, Any]
    config: str | None = None
    test: str = "validation"


def _always(*values: str) -> Callable[[Row], Sequence[str]]:
    return lambda row: values


_LISTED = {
    "choices": lambda row: (row["choices"] or {}).get("text"),
    "labels": lambda row: (row["choices"] or {}).get("label"),
    "answer": "answerKey",
    "test": "test",
}
_LISTED_SCHEMA = {"choices": {"text": ["text"], "label": ["text"]}, "answerKey": "text"}
_ARC = {"question": "{question}", "schema": {"question": "text"} | _LISTED_SCHEMA} | _LISTED

ORIGINALS = {
    "ARC-Challenge": Original("allenai/ai2_arc", config="ARC-Challenge", **_ARC),
    "ARC-Easy": Original("allenai/ai2_arc", config="ARC-Easy", **_ARC),
    "boolq": Original(
        "google/boolq",
        question="{question}",
        choices=_always("true", "false"),
        labels=_always("True", "False"),
        answer="answer",
        schema={"question": "text", "answer": "true or false"},
    ),
    "hellaswag": Original(
        "Rowan/hellaswag",
        question="{activity_label}: {ctx}",
        choices=itemgetter("endings"),
        labels=_always("0", "1", "2", "3"),
        answer="label",
        schema={"activity_label": "text", "ctx": "text", "endings": ["text"], "label": _LABEL},
    ),
    "openbookqa": Original(
        "allenai/openbookqa",
        config="main",
        question="{question_stem}",
        schema={"question_stem": "text"} | _LISTED_SCHEMA,
        **_LISTED,
    ),
    "piqa": Original(
        "baber/piqa",
        question="{goal}",
        choices=itemgetter("sol1", "sol2"),
        labels=_always("0", "1"),
        answer="label",
        schema={"goal": "text", "sol1": "text", "sol2": "text", "label": _LABEL},
    ),
    "social_i_qa": Original(
        "lighteval/siqa",
        question="{context} {question}",
        choices=itemgetter("answerA", "answerB", "answerC"),
        labels=_always("1", "2", "3"),
        answer="label",
        schema=dict.fromkeys(("context", "question", "answerA", "answerB", "answerC"), "text") | {"label": _LABEL},
    ),
    "winogrande": Original(
        "allenai/winogrande",
        config="winogrande_xl",
        question="{sentence}",
        choices=itemgetter("option1", "option2"),
        labels=_always("1", "2"),
        answer="answer",
        schema={"sentence": "text", "option1": "text", "option2": "text", "answer": _LABEL},
    ),
}


def load_originals(
    tasks: Sequence[str] | None = None, split: str = "train", limit: int | None = None, seed: int = 0
) -> Dataset:
    """Rows of the tasks' originals with the text columns `prompt`, `completion`, `task` and `answer`.

    The arguments are those of `load_commonsense`, and so is the choice of `limit` rows: files that hold the same rows
    in the same order give the same data set. None for `tasks` takes all eight.

    Raises:
        ValueError: a task, split or limit is not one, or a data set does not have the fields and labels of its task.
        OSError: a data set, or its split, cannot be loaded from the Hub or its cache.
    """
    check_split(split)
    check_limit(limit)
    rows = []
    for task in ORIGINALS if tasks is None else check_tasks(tasks, ORIGINALS):
        rows.extend(render_row(row, task) for row in original_rows(task, split, limit, seed))
    return to_dataset(rows)


def original_rows(task: str, split: str = "train", limit: int | None = None, seed: int = 0) -> list[dict[str, str]]:
    """Rows of one task in the published layout; the arguments and errors are those of `load_originals`."""
    original = ORIGINALS[task]
    where = " ".join(filter(None, [original.repository, original.config, original.test if split == "test" else split]))
    dataset = _load(task, split)
    kept = draw_rows(len(dataset), limit, task, split, seed)
    _check_schema(dataset, original, where)
    answers = dataset.features[original.answer]
    drawn = zip(kept, dataset.select(kept), strict=True)
    return [_published(task, row, answers, f"row {i} of {where}") for i, row in drawn]


def _load(task: str, split: str) -> Dataset:
    original = ORIGINALS[task]
    split = original.test if split == "test" else split
    try:
        return load_dataset(original.repository, original.config, split=split)
    except Exception as error:  # the clients below raise types of their own, of the network and of the cache
        raise OSError(
            f"Expected the {split} split of {original.repository} for the task {task}, found {reason(error)}: load it "
            "once where the Hub can be reached, or give data_dir a folder of the published files."
        ) from error


def reason(error: Exception) -> str:
    """What made a data set fail to load, in one line; `datasets` wraps some causes in a sentence that says nothing."""
    cause = error.__cause__ or error
    if isinstance(cause, StopIteration):
        return "nothing in it"
    if isinstance(cause, UnicodeError):
        return f"text that is not UTF-8 ({foreign_text(cause, 120)})"
    return foreign_text(scrub(str(cause)), LONGEST_REASON).rstrip(".") or type(error).__name__


def _check_schema(dataset: Dataset, original: Original, where: str) -> None:
    found = {name: _kind(dataset.features[name]) for name in original.schema if name in dataset.features}
    differing = [
        f"{name} as {_text(found.get(name, 'nothing'))} instead of {_text(expected)}"
        for name, expected in original.schema.items()
        if found.get(name) != expected and not (expected is _LABEL and found.get(name) in _LABEL)
    ]
    if differing:
        raise ValueError(
            f"Expected {where} to have the fields of the original, found {', '.join(differing)}: {_REMEDY}."
        )


def _kind(feature: Any) -> Any:
    """A feature in the words of `Original.schema`."""
    if isinstance(feature, ClassLabel):
        return "class label"
    if isinstance(feature, List):
        return [_kind(feature.feature)]
    if isinstance(feature, dict):
        return {name: _kind(inner) for name, inner in feature.items()}
    kinds = {"string": "text", "large_string": "text", "bool": "true or false"}
    name = feature.dtype if isinstance(feature, Value) else type(feature).__name__
    return kinds.get(name, "integer" if name.startswith(("int", "uint")) else name)


def _text(kind: Any) -> str:
    if isinstance(kind, tuple):
        return " or ".join(kind)
    if isinstance(kind, list):
        return f"a list of {_text(kind[0])}"
    if isinstance(kind, dict):
        return f"({', '.join(f'{name}: {_text(inner)}' for name, inner in kind.items())})"
    return kind


def _published(task: str, row: Row, answers: Any, where: str) -> dict[str, str]:
    """The published row of one original row; `answers` is the feature of the answer's field."""
    original = ORIGINALS[task]
    choices, labels = list(original.choices(row) or []), [str(label) for label in original.labels(row) or []]
    answer = row[original.answer]
    if isinstance(answers, ClassLabel) and answer is not None and 0 <= answer < answers.num_classes:
        answer = answers.int2str(answer)
    answer = "" if answer in (None, -1) else str(answer).strip()
    if any(row[name] is None for name, kind in original.schema.items() if kind == "text") or None in choices:
        expected, found = "a text in each field that the prompt shows", "a field or choice without one"
    elif len(choices) < 2 or len(labels) != len(choices) or len(set(labels)) < len(labels):
        expected = "two or more choices with a label each"
        found = f"{len(choices)} with the labels {', '.join(labels) or '(none)'}"
    elif answer not in labels:
        expected = f"{original.answer} to be one of {', '.join(labels)}"
        found = repr(answer) if answer not in ("", "-1") else "no label"
    else:
        return published_row(task, original.question.format_map(row), choices, labels.index(answer))
    raise ValueError(f"Expected {expected}, found {found} in {where} (from 0): {_REMEDY}.")
