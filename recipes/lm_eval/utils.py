"""What the task files beside this one refer to: this project's rows, prompts and rule of the first answer."""

import os
from collections.abc import Iterable, Mapping

from datasets import Dataset

from fslora_hf.data import completions, load_commonsense, load_originals, options
from fslora_hf.evaluation.outcomes import own_answers, read_answer


def load(task: str, **_) -> dict[str, Dataset]:
    """The test rows of one task with their prompts, completions (`choices`) and the right one's position (`target`).

    The space in front of a completion is the task files' delimiter, which the harness does not count among a choice's
    characters.

    Read from `<FSLORA_COMMONSENSE_DIR>/<task>/test.json` if that variable is set, else the originals on the Hub. The
    other arguments are the model's, which lm-eval hands to every data set.
    """
    folder = os.environ.get("FSLORA_COMMONSENSE_DIR")
    rows = load_commonsense(folder, [task], "test") if folder else load_originals([task], "test")
    return {"test": Dataset.from_list([{**row, **_choices(row)} for row in rows])}


def first_answers(texts: Iterable[list[str]], docs: Iterable[Mapping[str, str]]) -> list[list[str]]:
    """The answer that each generated text names first, or an empty text, which no answer equals."""
    return [
        [read_answer(text, doc["task"], own_answers([(doc["task"], options(doc))])) or "" for text in of_doc]
        for of_doc, doc in zip(texts, docs, strict=True)
    ]


def _choices(row: Mapping[str, str]) -> dict:
    return {
        "choices": [text.removeprefix(" ") for text in completions(row)],
        "target": options(row).index(row["answer"]),
    }
