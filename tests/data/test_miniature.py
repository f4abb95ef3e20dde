"""The miniature set: what can be learned from it is in its questions alone, and no question is in both splits."""

import re
from collections import Counter, defaultdict

import pytest

from fslora_hf.data import TASKS, load_miniature, options
from fslora_hf.data.miniature import facts, miniature_rows

CHOICES = {
    "ARC-Challenge": 4,
    "ARC-Easy": 4,
    "boolq": 2,
    "hellaswag": 4,
    "openbookqa": 4,
    "piqa": 2,
    "social_i_qa": 3,
    "winogrande": 2,
}
each_task = pytest.mark.parametrize("task", TASKS)
each_draw = pytest.mark.parametrize(("split", "rows", "seed"), [("train", 240, 0), ("train", 36, 7), ("test", 96, 1)])


def parts(row: dict[str, str]) -> tuple[str, tuple[str, ...], int]:
    """Question, option texts and position of the right one, read from the published text."""
    names = options(row)
    correct = names.index(row["answer"])
    asked, _, rest = row["instruction"].partition("\n\n")
    if names == ["true", "false"]:
        return asked, ("true", "false"), correct
    listed = rest.rpartition("Answer format: ")[0]
    texts = re.split("|".join(f"{name.capitalize()}: " for name in names), listed)[1:]
    return asked, tuple(text.strip() for text in texts), correct


@each_task
@each_draw
def test_options_alone_say_nothing(task, split, rows, seed):
    """Whatever list of options is shown, each of its places is right equally often: no guess beats chance."""
    answers = defaultdict(Counter)
    shown, right = Counter(), Counter()
    for row in miniature_rows(task, split, rows, seed):
        _, texts, correct = parts(row)
        assert len(texts) == len(set(texts)) == CHOICES[task]
        answers[texts][correct] += 1
        shown.update(texts)
        right[texts[correct]] += 1
    for counts in answers.values():
        assert len(counts) == CHOICES[task] and len(set(counts.values())) == 1
    assert shown == {text: CHOICES[task] * right[text] for text in shown}
    assert sum(right.values()) == rows


EVENTS = {event: "true" for event in facts.PLEASANT} | dict.fromkeys(facts.UNPLEASANT, "false")


def event_in(row: dict[str, str]) -> str:
    return next(event for event in EVENTS if event in row["instruction"])


@each_draw
def test_in_boolq_only_the_event_tells_true_from_false(split, rows, seed):
    """Who is asked about, and in which words, is so equally often for true and for false."""
    true, false = Counter(), Counter()
    for row in miniature_rows("boolq", split, rows, seed):
        assert row["answer"] == EVENTS[event_in(row)]
        (true if row["answer"] == "true" else false)[row["instruction"].replace(event_in(row), "")] += 1
    assert true == false and sum(true.values()) == rows // 2


@each_draw
def test_in_winogrande_the_order_of_the_people_says_nothing(split, rows, seed):
    answers = defaultdict(Counter)
    for row in miniature_rows("winogrande", split, rows, seed):
        asked, _, correct = parts(row)
        answers[asked.partition(", so the ")[0]][correct] += 1
    assert all(counts[0] == counts[1] for counts in answers.values())


@each_task
def test_a_question_has_one_answer_and_one_split(task):
    answers = defaultdict(set)
    for split in ("train", "test"):
        for seed in range(4):
            for row in miniature_rows(task, split, 96, seed):
                asked, texts, correct = parts(row)
                answers[asked].add((split, texts[correct]))
    assert all(len(found) == 1 for found in answers.values())
    assert {split for found in answers.values() for split, _ in found} == {"train", "test"}


@pytest.mark.parametrize("task", ["boolq", "winogrande"])
def test_what_questions_are_about_is_in_one_split_only(task):
    things = set(EVENTS) if task == "boolq" else set(facts.NAMES.split())
    asked = {
        split: {
            thing
            for seed in range(8)
            for row in miniature_rows(task, split, 120, seed)
            for thing in ([event_in(row)] if task == "boolq" else re.findall(r"\w+", row["instruction"]))
            if thing in things
        }
        for split in ("train", "test")
    }
    assert asked["train"] | asked["test"] == things and not asked["train"] & asked["test"]


@each_task
def test_rows_are_different_and_fixed_by_the_seed(task):
    rows = miniature_rows(task, "train", 120, 5)
    assert len({row["instruction"] for row in rows}) == len(rows) == 120
    assert rows == miniature_rows(task, "train", 120, 5)
    assert rows[:60] == miniature_rows(task, "train", 60, 5)
    assert rows != miniature_rows(task, "train", 120, 6)


def test_all_tasks_come_in_equal_numbers_as_prompts_and_completions():
    rows = load_miniature("test", rows_per_task=24)
    assert rows.column_names == ["prompt", "completion", "task", "answer"]
    assert Counter(rows["task"][:]) == dict.fromkeys(TASKS, 24)
    assert all(row["completion"] == f" the correct answer is {row['answer']}" for row in rows)
    assert set(load_miniature(tasks=["piqa", "boolq"], rows_per_task=12)["task"][:]) == {"piqa", "boolq"}


def test_the_facts_carry_the_balance():
    """Lists whose entries repeat, or that do not end on a test entry, would weaken the claims above."""
    for words in [members.split() for members in facts.KINDS.values()] + [facts.NAMES.split()]:
        assert len(set(words)) == len(words) and len(words) % 4 == 0
    things = [word for members in facts.KINDS.values() for word in members.split()]
    assert len(set(things)) == len(things)
    for uses in (facts.PURPOSES, facts.OPPOSITES, facts.PROCEDURES):
        assert len(set(uses.values())) == len(uses) and len(uses) % 4 == 0
    assert len({end for _, end in facts.SCENES.values()}) == len(facts.SCENES)
    assert not [(a, b) for a in EVENTS for b in EVENTS if a != b and a in b]
    assert len(facts.PLEASANT) == len(facts.UNPLEASANT) == len(EVENTS) // 2
    opposites = facts.OPPOSITES
    assert not set(opposites) & set(opposites.values())


@pytest.mark.parametrize("rows", [0, -12, 10, 100])
def test_numbers_of_rows_that_cannot_balance(rows):
    with pytest.raises(ValueError, match=f"^Expected rows_per_task to be .* multiple of 12.* found {rows}: take"):
        load_miniature(rows_per_task=rows)


def test_more_rows_than_there_are_facts():
    with pytest.raises(ValueError, match="^Expected at most about .* rows of piqa for the test split, found .*6000: "):
        load_miniature("test", ["piqa"], rows_per_task=6000)


@pytest.mark.parametrize(("arguments", "found"), [({"split": "dev"}, "dev"), ({"tasks": ["copa"]}, "copa")])
def test_bad_names(arguments, found):
    with pytest.raises(ValueError, match=f"^Expected .*found .*{found}"):
        load_miniature(**arguments)
