"""Generation against transformers' own, one unpadded prompt at a time, and against a greedy loop in plain torch."""

import math

import pytest
import torch
from datasets import Dataset
from peft import get_peft_model

from fslora_hf.data import load_miniature
from fslora_hf.evaluation import Generate, score_rows
from tests.evaluation.test_loglikelihood import fitted, tokenizer
from tests.support import tiny


@pytest.fixture(scope="module")
def model():
    return fitted(tiny.base_model())


@pytest.fixture(scope="module")
def rows() -> Dataset:
    whole = load_miniature("test", ["piqa", "boolq", "winogrande"], rows_per_task=12)
    return whole.select([(i * 7) % len(whole) for i in range(10)])


def texts(scores) -> list[str]:
    return [outcome.text for outcome in scores.outcomes]


@pytest.mark.parametrize("beams", [1, 4])
def test_texts_are_those_of_single_unpadded_prompts_for_any_batch_size(model, rows, beams):
    model.eval()
    alone = []
    for row in rows:
        ids = torch.tensor([tokenizer()(row["prompt"])["input_ids"]])
        written = model.generate(
            ids, num_beams=beams, max_new_tokens=6, do_sample=False, eos_token_id=0, pad_token_id=0
        )
        alone.append(tokenizer().decode(written[0, ids.shape[1] :], skip_special_tokens=True))
    assert len(set(alone)) > 1
    for batch_size, side in ((1, "right"), (3, "left"), (32, "right")):
        protocol = Generate(beams, 6)
        assert texts(score_rows(model, tokenizer(padding_side=side), rows, protocol, batch_size)) == alone


def test_one_beam_is_greedy(model, rows):
    model.eval()
    for row, found in zip(rows, texts(score_rows(model, tokenizer(), rows, Generate(1, 5))), strict=True):
        ids = tokenizer()(row["prompt"])["input_ids"]
        new = []
        with torch.no_grad():
            while len(new) < 5 and new[-1:] != [0]:
                new.append(int(model(input_ids=torch.tensor([ids + new])).logits[0, -1].argmax()))
        assert tokenizer().decode(new, skip_special_tokens=True) == found


def write(monkeypatch, model, answers: list[str]) -> None:
    """Make the model write these texts."""
    left = list(answers)

    def generate(input_ids, **kwargs):
        new = [tokenizer()(left.pop(0))["input_ids"] for _ in input_ids]
        new = [ids + [0] * (max(map(len, new)) - len(ids)) for ids in new]
        return torch.cat([input_ids, torch.tensor(new, dtype=torch.int64)], 1)

    monkeypatch.setattr(model, "generate", generate)


def test_the_first_answer_in_the_text_counts(model, rows, monkeypatch):
    row = rows.filter(lambda row: row["task"] == "piqa" and row["answer"] == "solution1")[0]
    said = {
        "the correct answer is solution1": "solution1",
        " solution1 rather than solution2": "solution1",
        "solution2, not solution1": "solution2",
        "Solution1": None,
        "answer1": None,
        "": None,
        "solution1\n\n### Instruction:\n### Response: solution2": "solution1",
        "none ### Response: solution1": None,  # the benchmark reads up to the next mark
    }
    write(monkeypatch, model, list(said))
    scores = score_rows(model, tokenizer(), Dataset.from_list([row] * len(said)), "generate", batch_size=8)
    assert [outcome.choice for outcome in scores.outcomes] == list(said.values())
    score = scores.tasks["piqa"]
    assert (score.accuracy, score.rows, score.invalid) == (3 / 8, 8, 4)
    assert score.format_validity == 4 / 8
    assert scores.metrics.keys() == {"accuracy"} and scores.not_finite == 0


def test_tasks_of_ones_own(model, monkeypatch):
    row = {"prompt": "Yes?\n\nAnswer format: yes/no\n\n### Response:", "completion": " yes", "answer": "yes"}
    write(monkeypatch, model, ["no yes", "yes"])
    scores = score_rows(model, tokenizer(), Dataset.from_list([row | {"task": "mine"}] * 2), "generate")
    assert [outcome.choice for outcome in scores.outcomes] == ["no", "yes"]
    assert scores.tasks["mine"].accuracy == 0.5


def test_of_ones_own_task_any_questions_option_is_an_answer(model, monkeypatch):
    """As in the benchmark, where a task has its answers; the outcomes and the metric judge alike."""
    rows = [
        {
            "prompt": f"Which?\n\nAnswer format: {options}\n\n### Response:",
            "completion": f" {answer}",
            "answer": answer,
        }
        for options, answer in (("cat/cow", "cat"), ("dog/pig", "dog"))
    ]
    write(monkeypatch, model, ["dog, or rather cat", "dog"])
    scores = score_rows(model, tokenizer(), Dataset.from_list([row | {"task": "mine"} for row in rows]), "generate")
    assert [outcome.choice for outcome in scores.outcomes] == ["dog", "dog"]
    assert scores.tasks["mine"].accuracy == 0.5 == sum(outcome.correct for outcome in scores.outcomes) / 2


def test_a_models_own_settings_of_generation_do_not_count(rows):
    plain, own = fitted(tiny.base_model()), fitted(tiny.base_model())
    own.generation_config.repetition_penalty, own.generation_config.no_repeat_ngram_size = 5.0, 1
    own.generation_config.do_sample, own.generation_config.temperature = True, 2.0
    expected = texts(score_rows(plain, tokenizer(), rows, Generate(2, 6)))
    assert texts(score_rows(own, tokenizer(), rows, Generate(2, 6))) == expected
    assert own.generation_config.repetition_penalty == 5.0  # left as it was
    own.generation_config.do_sample, own.generation_config.temperature = None, None
    adapted = get_peft_model(own, tiny.lora_config())  # B is zero: the same model
    assert texts(score_rows(adapted, tokenizer(), rows, Generate(2, 6))) == expected


@pytest.mark.parametrize("beams", [1, 3])
def test_logits_that_are_no_numbers_count_as_wrong_and_are_reported(rows, beams, caplog):
    broken = fitted(tiny.base_model())
    broken.get_input_embeddings().weight.data[tokenizer()("Q")["input_ids"]] = math.nan
    some = rows.select(range(4))
    marked = some.map(lambda row, i: {"prompt": ("Q" if i == 2 else "") + row["prompt"]}, with_indices=True)
    scores = score_rows(broken, tokenizer(), marked, Generate(beams, 4))
    sound = score_rows(broken, tokenizer(), some, Generate(beams, 4))
    for i, (outcome, expected) in enumerate(zip(scores.outcomes, sound.outcomes, strict=True)):
        if i == 2:
            assert (outcome.choice, outcome.text, outcome.finite, outcome.correct) == (None, "", False, False)
        else:
            assert outcome == expected
    assert scores.not_finite == 1
    assert "In 1 of 4 questions the model computed something that is not a number" in caplog.text


def test_an_answer_that_no_text_can_give_is_told_before_anything_is_written(model):
    """Rows of one's own under a benchmark's name, whose answers the benchmark does not have."""
    prompt = "Which?\n\nAnswer format: yes/no\n\n### Response:"
    row = {"prompt": prompt, "completion": " yes", "answer": "yes", "task": "boolq"}
    message = (
        r"^Expected an answer that a text can be found to give in the task boolq, found 'yes' in row 0 \(from 0\)"
    )
    with pytest.raises(ValueError, match=message):
        score_rows(model, tokenizer(), Dataset.from_list([row]), "generate")
    assert score_rows(model, tokenizer(), Dataset.from_list([row])).tasks["boolq"].rows == 1  # options can be scored


def test_what_cannot_be_asked(model, rows):
    for name, values in (("num_beams", (0, 32)), ("max_new_tokens", (4, 0))):
        with pytest.raises(ValueError, match=f"^Expected {name} of at least 1, found 0: raise it"):
            Generate(*values)
    longest = max(len(row["prompt"].encode()) for row in rows)
    with pytest.raises(ValueError, match=f"^Expected rows of at most {longest + 7} tokens with 8 new ones, found"):
        score_rows(model, tokenizer(), rows, Generate(1, 8), max_length=longest + 7)
    with pytest.raises(ValueError, match="^Expected a protocol out of loglikelihood, generate, found 'guess'"):
        score_rows(model, tokenizer(), rows, "guess")
