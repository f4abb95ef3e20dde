"""Rows of the published layout taken apart again, by a reading of their text that knows nothing of the templates."""

import re

from fslora_hf.data import options


def taken_apart(task: str, row: dict[str, str]) -> tuple[str, list[str], int]:
    """Question, choices and position of the right choice: the arguments of `published_row` that wrote the row."""
    names = options(row)
    body = row["instruction"].removesuffix("Answer format: " + "/".join(names))
    marks = "" if task == "boolq" else "|".join(f"{name.capitalize()}: " for name in names)
    question, *choices = re.split(marks, body) if marks else (body,)
    question = question.split(": ", 2 if task == "boolq" else 1)[-1]
    question = question.removesuffix("\n\n").removesuffix("?" if task == "boolq" else "")
    separator = "\n\n" if task == "piqa" else " "
    closing = " " if task == "winogrande" else "\n\n"
    texts = [c.removesuffix(separator) for c in choices[:-1]] + [c.removesuffix(closing) for c in choices[-1:]]
    return question, texts or names, names.index(row["answer"])
