"""The commonsense rows: published layout in, one rendering out, and the published texts of all eight tasks."""

import json
import re

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from fslora_hf.data import TASKS, completions, load_commonsense, load_miniature, options, render_completion
from fslora_hf.data.prompts import render_prompt
from fslora_hf.data.templates import published_row
from tests.support.published import taken_apart

# (question, choices, position of the right one, published instruction, published answer)
PUBLISHED = {
    "ARC-Challenge": (
        "Which gas do plants take in?",
        ["oxygen", "carbon dioxide", "helium"],
        1,
        "Please choose the correct answer to the question: Which gas do plants take in?\n\n"
        "Answer1: oxygen Answer2: carbon dioxide Answer3: helium\n\nAnswer format: answer1/answer2/answer3",
        "answer2",
    ),
    "ARC-Easy": (
        "What is ice?",
        ["a gas", "a metal", "a solid", "a plant", "an animal"],
        2,
        "Please choose the correct answer to the question: What is ice?\n\n"
        "Answer1: a gas Answer2: a metal Answer3: a solid Answer4: a plant Answer5: an animal\n\n"
        "Answer format: answer1/answer2/answer3/answer4/answer5",
        "answer3",
    ),
    "boolq": (
        "is water wet",
        ["true", "false"],
        0,
        "Please answer the following question with true or false, question: is water wet?\n\n"
        "Answer format: true/false",
        "true",
    ),
    "hellaswag": (
        "Diving: A man jumps. He",
        ["sinks.", "flies.", "sings.", "melts."],
        0,
        "Please choose the correct ending to complete the given sentence: Diving: A man jumps. He\n\n"
        "Ending1: sinks. Ending2: flies. Ending3: sings. Ending4: melts.\n\n"
        "Answer format: ending1/ending2/ending3/ending4",
        "ending1",
    ),
    "openbookqa": (
        "Predators eat",
        ["lions", "humans", "bunnies", "grass"],
        3,
        "Please choose the correct answer to the question: Predators eat\n\n"
        "Answer1: lions Answer2: humans Answer3: bunnies Answer4: grass\n\n"
        "Answer format: answer1/answer2/answer3/answer4",
        "answer4",
    ),
    "piqa": (
        "dry a cup",
        ["Use a towel.", "Use a hose."],
        0,
        "Please choose the correct solution to the question: dry a cup\n\n"
        "Solution1: Use a towel.\n\nSolution2: Use a hose.\n\nAnswer format: solution1/solution2",
        "solution1",
    ),
    "social_i_qa": (
        "Kai cried. How does Kai feel?",
        ["sad", "glad", "cold"],
        0,
        "Please choose the correct answer to the question: Kai cried. How does Kai feel?\n\n"
        "Answer1: sad Answer2: glad Answer3: cold\n\nAnswer format: answer1/answer2/answer3",
        "answer1",
    ),
    "winogrande": (
        "The cup did not fit in the box as _ was small.",
        ["cup", "box"],
        1,
        "Please choose the correct answer to fill in the blank to complete the given sentence: "
        "The cup did not fit in the box as _ was small.\n\n"
        "Option1: cup Option2: box Answer format: option1/option2",
        "option2",
    ),
}
TRAIN_ROWS = {"ARC-Challenge": 1119, "ARC-Easy": 2251, "boolq": 9427, "openbookqa": 4957}
# Published test rows; the folder of real rows may hold one half of them.
TEST_ROWS = {"ARC-Challenge": 1172, "ARC-Easy": 2376, "boolq": 3270, "openbookqa": 500, "winogrande": 1267}


def published(task: str) -> dict[str, str]:
    question, choices, correct, _, _ = PUBLISHED[task]
    return published_row(task, question, choices, correct)


def numbered(count: int) -> list[dict[str, str]]:
    """Rows that differ, with white space that a loader could be tempted to clean."""
    rows = [published_row("boolq", f"is  {i} \u00e9ven ", ("true", "false"), i % 2) for i in range(count)]
    return [{**row, "instruction": f" {row['instruction']} \n", "output": f"{row['output']} "} for row in rows]


def write(root, task, split, content):
    folder = root / task
    folder.mkdir(exist_ok=True)
    text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
    (folder / f"{split}.json").write_text(text, encoding="utf-8")


@pytest.mark.parametrize("task", TASKS)
def test_the_published_text_of_each_task(task):
    *_, instruction, answer = PUBLISHED[task]
    expected = {
        "instruction": instruction,
        "input": "",
        "output": f"the correct answer is {answer}",
        "answer": answer,
    }
    assert published(task) == expected
    assert options(expected) == instruction.split("Answer format: ")[1].split("/")


def test_rows_of_the_layout_come_out_rendered_and_in_order(tmp_path):
    write(tmp_path, "boolq", "train", numbered(5))
    write(tmp_path, "piqa", "train", [published("piqa")])
    loaded = load_commonsense(tmp_path, ["piqa", "boolq"])
    assert loaded.column_names == ["prompt", "completion", "task", "answer"]
    assert loaded["task"][:] == ["piqa"] + ["boolq"] * 5
    for row, source in zip(loaded, [published("piqa"), *numbered(5)], strict=True):
        assert row["prompt"] == f"### Instruction:\n{source['instruction']}\n\n### Response:"
        assert row["completion"] == f" {source['output']}"
        assert row["answer"] == source["answer"]


def test_without_tasks_every_task_that_has_the_split_is_taken(tmp_path):
    for task in ("winogrande", "ARC-Easy"):
        write(tmp_path, task, "test", [published(task)])
    write(tmp_path, "piqa", "train", [published("piqa")])
    assert load_commonsense(tmp_path, split="test")["task"][:] == ["ARC-Easy", "winogrande"]


def test_nothing_is_written_beside_the_rows(tmp_path):
    write(tmp_path, "boolq", "train", numbered(3))
    before = sorted(tmp_path.rglob("*"))
    assert load_commonsense(tmp_path).cache_files == []
    assert sorted(tmp_path.rglob("*")) == before


def test_a_limit_draws_rows_that_a_larger_limit_contains(tmp_path):
    write(tmp_path, "boolq", "train", numbered(40))
    whole = load_commonsense(tmp_path)["prompt"][:]
    few, more = (load_commonsense(tmp_path, limit=n, seed=3)["prompt"][:] for n in (10, 25))
    assert len(few) == 10 and set(few) < set(more) < set(whole)
    assert [whole.index(prompt) for prompt in few] == sorted(whole.index(prompt) for prompt in few)
    assert few == load_commonsense(tmp_path, limit=10, seed=3)["prompt"][:] != whole[:10]
    assert few != load_commonsense(tmp_path, limit=10, seed=4)["prompt"][:]
    assert load_commonsense(tmp_path, limit=1000)["prompt"][:] == whole


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"tasks": ["boolq", "copa"]},
            r"tasks out of ARC-Challenge, .*, found \['boolq', 'copa'\]: correct",
        ),
        ({"tasks": ["boolq", "boolq"]}, r"different tasks out of .*, found \['boolq', 'boolq'\]: correct"),
        ({"tasks": []}, r"different tasks out of .*, found \[\]: correct"),
        ({"split": "dev"}, r"one of train, test, found 'dev': name"),
        ({"limit": 0}, r"at least 1 row per task, found 0: leave"),
    ],
)
def test_bad_arguments(tmp_path, arguments, message):
    write(tmp_path, "boolq", "train", numbered(3))
    with pytest.raises(ValueError, match=f"^Expected .*{message}"):
        load_commonsense(tmp_path, **arguments)


def test_missing_folders_and_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="^Expected a folder of .*, found none at .*nowhere: correct the path"):
        load_commonsense(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="^Expected the file of at least one task, found no .*boolq"):
        load_commonsense(tmp_path)
    write(tmp_path, "boolq", "train", numbered(3))
    with pytest.raises(FileNotFoundError, match="^Expected the file of every .* found no .*piqa/train.json, .*winog"):
        load_commonsense(tmp_path, ["boolq", "piqa", "winogrande"])


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"output": None}, "no text in output"),
        ({"instruction": 3, "answer": ""}, "no text in instruction, answer"),
        ({"input": "a passage"}, "an input beside the instruction, which the prompt would not show,"),
        ({"instruction": "is it so?"}, "no usable answer format"),
        ({"instruction": "is it so?\n\nAnswer format: true/true"}, "no usable answer format"),
        ({"answer": "maybe"}, "the answer 'maybe', not one of true/false,"),
        ({"output": "I do not know"}, "the output 'I do not know', which does not name the answer 'true',"),
    ],
)
def test_a_row_that_cannot_be_used_is_named(tmp_path, change, found):
    write(tmp_path, "boolq", "train", [*numbered(2), {**published("boolq"), **change}])
    with pytest.raises(ValueError, match=rf"^Expected every row .*, found {re.escape(found)} in row 2 \(from 0\): "):
        load_commonsense(tmp_path)


@pytest.mark.parametrize(
    ("content", "found"),
    [("[{]", "to be UTF-8 JSON, found"), ("{}", "a list of rows, found dict"), ("[]", r"a list of rows, found \[\]")],
)
def test_a_file_that_holds_no_rows(tmp_path, content, found):
    write(tmp_path, "boolq", "train", content)
    with pytest.raises(ValueError, match=f"^Expected .*train.json .*{found}"):
        load_commonsense(tmp_path)


def test_a_row_that_is_no_object(tmp_path):
    write(tmp_path, "boolq", "train", [*numbered(1), "text"])
    with pytest.raises(ValueError, match="found a str in row 1"):
        load_commonsense(tmp_path)


def test_options_are_the_last_answer_format_stated():
    question = "Is this an 'Answer format: a/b'?\n\nAnswer format: option1/option2"
    assert options({"instruction": question}) == options({"prompt": render_prompt(question)}) == ["option1", "option2"]


@pytest.mark.parametrize("stated", ["", "Answer format: ", "Answer format: a", "Answer format: a//b"])
def test_text_without_options(stated):
    with pytest.raises(ValueError, match="^Expected an instruction that ends in .* found '.*': state each"):
        options({"instruction": f"why?\n\n{stated}"})


def test_completions_exchange_the_answer_alone():
    row = {"prompt": "true?\n\nAnswer format: true/false", "completion": " it is true: true.", "answer": "true"}
    assert completions(row) == [" it is true: true.", " it is true: false."]
    for wrong in ({"answer": "perhaps"}, {"completion": " it is so"}):
        with pytest.raises(ValueError, match="^Expected an answer that is one of true/false .* correct the row"):
            completions(row | wrong)


def trained_tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """A tokenizer that merges whatever its splitting rule lets it merge in our own rows."""
    texts = [row["prompt"] + "\n" + row["completion"] for row in load_miniature(rows_per_task=12)]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind == "byte level")
    if kind == "metaspace":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Metaspace()
    elif kind == "line feeds join punctuation":
        # A rule of newer vocabularies: punctuation takes the line feeds behind it along.
        rule = Regex(r" ?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+")
        split = pre_tokenizers.Split(rule, behavior="isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    else:
        tokenizer.pre_tokenizer = byte_level
    trainer = trainers.BpeTrainer(vocab_size=5000, special_tokens=["<unk>", "</s>"], show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>")


def keeps_the_prompt(tokenizer, prompt: str, completion: str) -> bool:
    alone, together = tokenizer(prompt)["input_ids"], tokenizer(prompt + completion)["input_ids"]
    return len(together) > len(alone) and together[: len(alone)] == alone


@pytest.mark.parametrize("kind", ["byte level", "line feeds join punctuation", "metaspace"])
def test_a_completion_leaves_the_prompts_tokens_alone(kind):
    tokenizer = trained_tokenizer(kind)
    for row in load_miniature("test", rows_per_task=12):
        assert keeps_the_prompt(tokenizer, row["prompt"], row["completion"] + "</s>")


def test_a_line_feed_before_the_completion_would_not():
    row = load_miniature(rows_per_task=12)[0]
    tokenizer = trained_tokenizer("line feeds join punctuation")
    assert not keeps_the_prompt(tokenizer, row["prompt"], "\n" + row["completion"])


def test_real_rows_are_the_published_number_and_come_back_as_they_were(commonsense_dir):
    for split, counts in (("train", TRAIN_ROWS), ("test", TEST_ROWS)):
        for task, count in counts.items():
            if not (commonsense_dir / task / f"{split}.json").exists():
                pytest.skip(f"Expected {task}/{split}.json in {commonsense_dir}, found none.")
            rows = load_commonsense(commonsense_dir, [task], split)
            sources = json.loads((commonsense_dir / task / f"{split}.json").read_text(encoding="utf-8"))
            assert len(rows) in ({count} if split == "train" else {count, (count + 1) // 2}), (task, split)
            assert rows["task"][:] == [task] * len(sources)
            assert rows["prompt"][:] == [render_prompt(source["instruction"]) for source in sources]
            assert rows["completion"][:] == [render_completion(source["output"]) for source in sources]
            assert rows["answer"][:] == [source["answer"] for source in sources]


def test_templates_write_the_real_rows(commonsense_dir):
    """Every real row, taken apart into its question and choices, comes back character by character."""
    for path in sorted(commonsense_dir.glob("*/*.json")):
        task = path.parent.name
        for source in json.loads(path.read_text(encoding="utf-8")):
            rebuilt = published_row(task, *taken_apart(task, source))
            assert rebuilt == source
