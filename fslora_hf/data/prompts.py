"""The one renderer of instructions: training and evaluation show the model exactly the same text.

The prompt ends in the colon of the response mark and the completion begins with a space. Byte-pair tokenizers split
in front of a space that a word follows, so the prompt's tokens stay as they are when a completion is appended; a line
feed would not do, because several vocabularies hold the colon and the line feed as one token.
"""

import hashlib
from collections.abc import Iterable, Mapping

from .templates import ANSWER_FORMAT, TEMPLATES

RESPONSE_MARK = "### Response:"
PROMPT_TEMPLATE = "### Instruction:\n{instruction}\n\n" + RESPONSE_MARK
COMPLETION_TEMPLATE = " {output}"


def render_prompt(instruction: str) -> str:
    """The text a response is asked for with; the instruction's white space is kept."""
    return PROMPT_TEMPLATE.format(instruction=instruction)


def render_completion(answer_output: str) -> str:
    """The text that answers a rendered prompt, to be appended to it; the end-of-sequence token is not part of it."""
    return COMPLETION_TEMPLATE.format(output=answer_output)


def prompt_hash(prompts: Iterable[str]) -> str:
    """16 hexadecimal digits that stand for how these prompts word a question.

    All prompts of this renderer share one, with the wording of the benchmark's tasks in it; rows with a prompt of
    another form share another.
    """
    before, after = PROMPT_TEMPLATE.split("{instruction}")
    foreign = any(not (prompt.startswith(before) and prompt.endswith(after)) for prompt in prompts)
    words = [PROMPT_TEMPLATE, COMPLETION_TEMPLATE, ANSWER_FORMAT, repr(TEMPLATES), "foreign" if foreign else ""]
    return hashlib.sha256("\0".join(words).encode()).hexdigest()[:16]


def options(row: Mapping[str, str]) -> list[str]:
    """The answers a row allows, such as `["answer1", "answer2"]`, read from its `Answer format: answer1/answer2`.

    `row` is a published row (field `instruction`) or a rendered one (field `prompt`).

    Raises:
        ValueError: the text states no answer format, or one with fewer than two, empty or repeated answers.
    """
    text = row["instruction"] if "instruction" in row else row["prompt"]
    stated = text.rpartition(ANSWER_FORMAT)[2].split("\n")[0].strip() if ANSWER_FORMAT in text else ""
    names = stated.split("/")
    if len(names) < 2 or "" in names or len(set(names)) < len(names):
        raise ValueError(
            f"Expected an instruction that ends in '{ANSWER_FORMAT}a/b' with two or more different answers, "
            f"found {stated!r}: state each allowed answer once, separated by slashes."
        )
    return names


def completions(row: Mapping[str, str]) -> list[str]:
    """The completion of each of the row's options: the row's own, with its answer exchanged for the option.

    Raises:
        ValueError: the row's answer is not one of its options, or its completion does not name its answer.
    """
    names = options(row)
    before, named, after = row["completion"].rpartition(row["answer"])
    if row["answer"] not in names or not named:
        raise ValueError(
            f"Expected an answer that is one of {'/'.join(names)} and is named in the completion, found answer "
            f"{row['answer']!r} and completion {row['completion']!r}: correct the row."
        )
    return [before + name + after for name in names]
