"""A small commonsense set that ships with the package, for machines that have no other data.

Its rows follow the published layout of all eight tasks, and are generated here from plain facts: kinds of things,
uses, opposites, feelings and the like. Rows come in blocks that share one list of options and ask one question for
each of them, so every option is right equally often wherever it stands, and nothing can be learned from the options
alone. No question of the train split is in the test split, whatever the seeds.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

from datasets import Dataset

from ..common.draws import permutation_prefix, uniforms
from .commonsense import check_split, check_tasks, render_row, to_dataset
from .templates import published_row

Row = dict[str, str]
Fact = tuple[str, str]  # a question (for boolq the subject of one) and its right answer

# Word lists and short sentences: every fourth entry of a list belongs to the test split, so lists keep their order.
# Any answer may stand beside any other as a wrong option, so none may also fit another entry's question.
#   KINDS: kind of thing -> its members, words that take "a" or "an"
#   PURPOSES: what somebody wants to do -> the thing made for it
#   OPPOSITES: word -> its opposite
#   PROCEDURES: goal -> what to do for it
#   FEELINGS: how somebody feels -> what happened, said after a name
#   SCENES: activity -> how a scene begins, how it goes on
#   COMPARISONS: what one is more than the other -> who it then is, who it is not
#   NAMES: of people; PLEASANT, UNPLEASANT: events; WISHES: ways to ask whether somebody likes one
facts = SimpleNamespace(**json.loads(Path(__file__).with_name("miniature_facts.json").read_text(encoding="utf-8")))

_ROWS_STEP = 12  # a multiple of the rows of every task's block
_PATIENCE = 1000  # draws in a row that bring nothing new before the facts count as used up
_CHOICES = {
    "ARC-Challenge": 4,
    "ARC-Easy": 4,
    "boolq": 2,
    "hellaswag": 4,
    "openbookqa": 4,
    "piqa": 2,
    "social_i_qa": 3,
    "winogrande": 2,
}


def load_miniature(
    split: str = "train", tasks: Sequence[str] | None = None, rows_per_task: int = 120, seed: int = 0
) -> Dataset:
    """Generated rows with the columns of `load_commonsense`: `prompt`, `completion`, `task` and `answer`.

    Args:
        split: `train` or `test`; they share no question.
        tasks: names out of the commonsense benchmark's eight, `TASKS`; None takes all.
        rows_per_task: a multiple of 12, so that the answers balance over two, three and four positions.
        seed: of the choice of facts and of their order.

    Raises:
        ValueError: a task or split is not one, or the facts do not yield that many different rows.
    """
    check_split(split)
    tasks = list(_CHOICES) if tasks is None else check_tasks(tasks, _CHOICES)
    if rows_per_task < _ROWS_STEP or rows_per_task % _ROWS_STEP:
        raise ValueError(
            f"Expected rows_per_task to be a positive multiple of {_ROWS_STEP}, so that answers balance over 2, 3 and "
            f"4 positions, found {rows_per_task}: take {max(1, rows_per_task // _ROWS_STEP) * _ROWS_STEP}."
        )
    return to_dataset(
        [render_row(row, task) for task in tasks for row in miniature_rows(task, split, rows_per_task, seed)]
    )


def miniature_rows(task: str, split: str, rows: int, seed: int) -> list[Row]:
    """Different rows of one task in the published layout; the arguments are those of `load_miniature`."""
    kinds = _facts(task, split)
    drawn: list[Row] = []
    seen: set[str] = set()
    attempt = latest = 0
    while attempt - latest < _PATIENCE:
        block = _block(task, kinds, (seed, "miniature", task, split, attempt))
        attempt += 1
        texts = {row["instruction"] for row in block}
        if seen.isdisjoint(texts):
            seen |= texts
            drawn += block
            latest = attempt
        if len(drawn) >= rows:
            return drawn
    raise ValueError(
        f"Expected at most about {len(drawn)} rows of {task} for the {split} split, found rows_per_task={rows}: "
        "the miniature set has no more facts, take fewer rows."
    )


def _block(task: str, kinds: list[list[Fact]], path: tuple) -> list[Row]:
    """Rows about facts of different kinds: one question for each answer, with the same options in the same order."""
    picks = permutation_prefix(len(kinds), _CHOICES[task], *path, "kinds").tolist()
    which, who, *within = uniforms(len(picks) + 2, *path, "within").tolist()
    chosen = [_pick(kinds[k], u) for k, u in zip(picks, within, strict=True)]
    questions, choices = (list(column) for column in zip(*chosen, strict=True))
    correct = list(range(len(choices)))
    if task == "boolq":
        questions = [_pick(facts.WISHES, which).format(event) for event in questions]
        correct, choices = [int(answer == "false") for answer in choices], ["true", "false"]
    if task == "winogrande":
        more, ends = _pick(list(facts.COMPARISONS.items()), which)
        questions = [f"{choices[0]} is {more} than {choices[1]}, so {end} is _." for end in ends]
    name = _pick(facts.NAMES.split(), who)
    return [published_row(task, q.replace("NAME", name), choices, i) for q, i in zip(questions, correct, strict=True)]


def _pick(items: Sequence, u: float):
    return items[int(u * len(items))]


def _facts(task: str, split: str) -> list[list[Fact]]:
    """The facts of a task that belong to the split, those of one kind in one list; kinds never share an answer."""

    def kept(items: Sequence) -> list:
        return [item for i, item in enumerate(items) if (i % 4 == 3) == (split == "test")]

    def single(pairs) -> list[list[Fact]]:
        return [[fact] for fact in kept(list(pairs))]

    match task:
        case "ARC-Challenge":
            return single((f"Which of these is used to {use}?", thing) for use, thing in facts.PURPOSES.items())
        case "ARC-Easy":
            return [
                [(f"Which kind of thing is {_a(word)}?", kind) for word in kept(members.split())]
                for kind, members in facts.KINDS.items()
            ]
        case "boolq":
            events = {"true": facts.PLEASANT, "false": facts.UNPLEASANT}
            return [[(event, answer) for event in kept(listed)] for answer, listed in events.items()]
        case "hellaswag":
            return single((f"{activity}: {start}", end) for activity, (start, end) in facts.SCENES.items())
        case "openbookqa":
            return single((f"The opposite of {word} is", opposite) for word, opposite in facts.OPPOSITES.items())
        case "piqa":
            return single((f"How do you {goal}?", means) for goal, means in facts.PROCEDURES.items())
        case "social_i_qa":
            return [
                [(f"NAME {event}. How does NAME feel?", feeling) for event in kept(events)]
                for feeling, events in facts.FEELINGS.items()
            ]
        case "winogrande":
            return single((name, name) for name in facts.NAMES.split())


def _a(word: str) -> str:
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"
