"""The published texts of the eight commonsense tasks: from a question and its choices to a published row.

The layout is that of the commonsense data of LLM-Adapters (Hu et al., EMNLP 2023), which the Federated Sketching LoRA
paper (arXiv 2501.19389) evaluates on. White space is part of it and differs between tasks.
"""

from collections.abc import Sequence
from dataclasses import dataclass

ANSWER_FORMAT = "Answer format: "
_CHOOSE = "Please choose the correct {} to the question: {{}}"


@dataclass(frozen=True)
class Template:
    """How one task words a row: `request` takes the question; `label` names and numbers the choices."""

    request: str
    label: str
    between: str = " "  # stands between two listed choices
    after: str = "\n\n"  # stands between the last choice and the answer format


TEMPLATES = {
    "ARC-Challenge": Template(_CHOOSE.format("answer"), "answer"),
    "ARC-Easy": Template(_CHOOSE.format("answer"), "answer"),
    "boolq": Template("Please answer the following question with true or false, question: {}?", ""),
    "hellaswag": Template("Please choose the correct ending to complete the given sentence: {}", "ending"),
    "openbookqa": Template(_CHOOSE.format("answer"), "answer"),
    "piqa": Template(_CHOOSE.format("solution"), "solution", between="\n\n"),
    "social_i_qa": Template(_CHOOSE.format("answer"), "answer"),
    "winogrande": Template(
        "Please choose the correct answer to fill in the blank to complete the given sentence: {}", "option", after=" "
    ),
}


def published_row(task: str, question: str, choices: Sequence[str], correct: int) -> dict[str, str]:
    """One row of the published layout.

    Args:
        task: name of the task's folder, a key of `TEMPLATES`.
        question: what is asked; for `boolq` without its question mark, for `hellaswag` with the activity in front.
        choices: texts to choose from; for `boolq` `("true", "false")`, which its instruction does not list.
        correct: position of the right choice, from 0.
    """
    template = TEMPLATES[task]
    names = [f"{template.label}{n}" for n in range(1, len(choices) + 1)] if template.label else list(choices)
    listed = template.between.join(f"{n.capitalize()}: {c}" for n, c in zip(names, choices, strict=True))
    instruction = template.request.format(question) + "\n\n" + (listed + template.after if template.label else "")
    return {
        "instruction": instruction + ANSWER_FORMAT + "/".join(names),
        "input": "",
        "output": f"the correct answer is {names[correct]}",
        "answer": names[correct],
    }
