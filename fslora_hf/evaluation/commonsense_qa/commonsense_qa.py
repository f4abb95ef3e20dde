"""Accuracy on the eight commonsense tasks of LLM-Adapters, from free text or from chosen options.

A metric of the package `evaluate`, complete in this file: see README.md beside it.
"""

import math
import re
from collections import Counter

import datasets
import evaluate

_DESCRIPTION = """
Accuracy by task and its macro average over the tasks of the commonsense benchmark of LLM-Adapters, with standard
errors, the share of questions that got a usable answer, and the share of the most common right answer.
"""

_INPUTS = """
Args:
    predictions: one a question, either texts, judged by the first of the task's answers that they name, or options
        counted from 0, with -1 where no option was chosen.
    references: the right answers: texts such as "answer3" beside texts, options counted from 0 beside options.
    task: the name of each question's task.
    answers (optional, to compute): {task: [every answer it allows]}, for texts of tasks that are not built in.

Returns:
    A dictionary with `accuracy`, `standard_error`, `format_validity`, `format_validity_standard_error` and
    `majority_rate` (macro averages over the tasks), `rows` and `invalid` (sums), and `tasks`, which holds the same of
    each task. All rates are shares of 1.

Example:
    >>> metric = evaluate.load("commonsense_qa")
    >>> scores = metric.compute(
    ...     predictions=["the correct answer is true", "I do not know"],
    ...     references=["true", "false"],
    ...     task=["boolq", "boolq"],
    ... )
    >>> scores["accuracy"], scores["format_validity"]
    (0.5, 0.5)
"""

_CITATION = """
@inproceedings{hu-etal-2023-llm,
    title = {{LLM}-Adapters: An Adapter Family for Parameter-Efficient Fine-Tuning of Large Language Models},
    author = {Hu, Zhiqiang and Wang, Lei and Lan, Yihuai and Xu, Wanyu and Lim, Ee-Peng and Bing, Lidong and Xu, Xing
        and Poria, Soujanya and Lee, Roy},
    booktitle = {Proceedings of the 2023 Conference on Empirical Methods in Natural Language Processing},
    year = {2023}
}
@misc{federated-sketching-lora,
    title = {Federated Sketching {LoRA}},
    note = {arXiv:2501.19389},
    year = {2025}
}
"""

RESPONSE_MARK = "### Response:"


def _numbered(label, count):
    return [f"{label}{number}" for number in range(1, count + 1)]


# What the published evaluation looks for. It knows five answers in each of the tasks that number them `answer`, also
# where the questions have fewer.
ANSWERS = {
    "ARC-Challenge": _numbered("answer", 5),
    "ARC-Easy": _numbered("answer", 5),
    "boolq": ["true", "false"],
    "hellaswag": _numbered("ending", 4),
    "openbookqa": _numbered("answer", 5),
    "piqa": _numbered("solution", 2),
    "social_i_qa": _numbered("answer", 5),
    "winogrande": _numbered("option", 2),
}


class CommonsenseQA(evaluate.Metric):
    """Accuracy, format validity and majority rate by task, and their macro averages."""

    def _info(self):
        features = [
            datasets.Features(
                {
                    "predictions": datasets.Value(kind),
                    "references": datasets.Value(kind),
                    "task": datasets.Value("string"),
                }
            )
            for kind in ("string", "int64")  # evaluate takes the first that fits the first row
        ]
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=features,
            reference_urls=["https://arxiv.org/abs/2304.01933", "https://arxiv.org/abs/2501.19389"],
        )

    def _compute(self, predictions, references, task, answers=None):
        judged = {}  # task -> (choice or None, right choice) of its questions
        for number, (prediction, reference, name) in enumerate(zip(predictions, references, task, strict=True)):
            if prediction is None or reference is None or name is None:
                raise ValueError(
                    "Expected a prediction, a reference and a task for every question, found None in question "
                    f"{number} (from 0): give an empty text, or -1 among options, where there is no answer."
                )
            if isinstance(prediction, str):
                pair = _judge_text(prediction, reference, name, answers, number)
            else:
                pair = _judge_option(prediction, reference, number)
            judged.setdefault(name, []).append(pair)
        return _averaged({name: _score(pairs) for name, pairs in judged.items()})

    @staticmethod
    def first_answer(text, task, answers=None):
        """The benchmark's rule: the answer of the task that the response names first, in its exact spelling, or None.

        `text` is the response alone, or prompt and response; of a text with response marks counts what stands between
        the first and the next. `answers` is that of `compute`. A task that is not known is a ValueError.
        """
        said = text.split(RESPONSE_MARK)[1] if RESPONSE_MARK in text else text
        # The longest first: of two names that begin alike, the text's is the one that goes on.
        names = sorted(_names(task, answers), key=len, reverse=True)
        found = re.search("|".join(map(re.escape, names)), said)
        return found.group() if found else None


def _names(task, answers):
    """All answers that a task allows."""
    known = {**ANSWERS, **(answers or {})}
    if task not in known:
        raise ValueError(
            f"Expected a task out of {', '.join(known)}, found {task!r}: correct its name, or list what it allows in "
            "the argument answers, {task: [names]}."
        )
    names = known[task]
    if isinstance(names, str) or not names or not all(isinstance(name, str) and name for name in names):
        raise ValueError(
            f"Expected the answers of the task {task!r} to be a list of texts, none of them empty, found {names!r}: "
            "list every answer the task allows."
        )
    return names


def _judge_text(text, reference, task, answers, number):
    names = _names(task, answers)
    if reference not in names:
        raise ValueError(
            f"Expected a reference out of {', '.join(names)} in the task {task!r}, found {reference!r} in question "
            f"{number} (from 0): correct the reference or the task."
        )
    return CommonsenseQA.first_answer(text, task, answers), reference


def _judge_option(option, reference, number):
    if option < -1 or reference < 0:
        raise ValueError(
            "Expected options counted from 0, and -1 only for a prediction without a choice, found prediction "
            f"{option} and reference {reference} in question {number} (from 0): correct the counting."
        )
    return (None if option == -1 else option), reference


def _score(pairs):
    """Scores of one task from its (choice or None, right choice)."""
    rows = len(pairs)
    accuracy = sum(choice == right for choice, right in pairs) / rows
    invalid = sum(choice is None for choice, _ in pairs)
    validity = (rows - invalid) / rows
    return {
        "accuracy": accuracy,
        "standard_error": math.sqrt(accuracy * (1 - accuracy) / rows),
        "format_validity": validity,
        "format_validity_standard_error": math.sqrt(validity * (1 - validity) / rows),
        "majority_rate": max(Counter(right for _, right in pairs).values()) / rows,
        "rows": rows,
        "invalid": invalid,
    }


def _averaged(tasks):
    """Rates of which every task makes up the same part, whatever its number of questions; and sums of counts."""

    def average(key):
        values = [scores[key] for scores in tasks.values()]
        if key in ("rows", "invalid"):
            return sum(values)
        if key.endswith("standard_error"):
            return math.hypot(*values) / len(values)
        return sum(values) / len(values)

    return {**{key: average(key) for key in next(iter(tasks.values()))}, "tasks": tasks}
