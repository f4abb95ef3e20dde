"""Rows as users of SFTTrainer bring them: many turns, longer than max_length, or with nothing to score."""

import logging

import pytest
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from fslora_hf import FederatedSketchConfig, FederatedSketchTrainer
from tests.support import tiny
from tests.support.worker_train import QUIET

TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] }} </s>{% endgeneration %} "
    "{% else %}{{ message['content'] }} {% endif %}{% endfor %}"
)
CLIENTS = 4


def conversations() -> Dataset:
    """40 rows: 10 of one turn, 30 of five turns whose first answer begins in the first quarter; and their clients."""
    rows = []
    for row in range(40):
        turns = 1 if row < 10 else 5
        words = [f"w{(row + n) % 29}" for n in range(9)]
        messages = []
        for _ in range(turns):
            messages.append({"role": "user", "content": " ".join(words[:3])})
            messages.append({"role": "assistant", "content": " ".join(words)})
        rows.append({"messages": messages, "client_id": row % CLIENTS})
    return Dataset.from_list(rows)


def tokenizer():
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def prepared(kind, folder, rows, **settings) -> list[dict]:
    """The rows that a trainer trains on."""
    trainer_class, config = kind
    trainer = trainer_class(
        model=tiny.base_model(),
        args=config(output_dir=str(folder), **QUIET, **settings),
        train_dataset=rows,
        processing_class=tokenizer(),
        peft_config=tiny.lora_config(),
    )
    return trainer.train_dataset.select_columns(["input_ids", "labels"]).to_list()


SFT, FEDERATED = (SFTTrainer, SFTConfig), (FederatedSketchTrainer, FederatedSketchConfig)


@pytest.mark.parametrize("setting", ["default", "keep_start"])
def test_conversations_longer_than_max_length(tmp_path, caplog, setting):
    """By default no answer is cut, and what that costs is told; with keep_start the rows are SFTTrainer's own."""
    shared = {"assistant_only_loss": True, "max_length": 24}
    with caplog.at_level(logging.WARNING, logger="fslora_hf"):
        given = {} if setting == "default" else {"overlong_prompts": setting}
        mine = prepared(FEDERATED, tmp_path, conversations(), **shared, **given)
    told = [message for message in caplog.messages if message.startswith("train:")]
    if setting == "default":
        assert len(mine) == 10
        assert told == [
            "train: 30 of 40 rows were dropped because they are longer than 24 tokens without the prompt before their "
            "first answer, and 1500 of 1600 scored tokens with them; set overlong_prompts to keep_start to have their "
            "ends cut instead, as SFTTrainer does."
        ]
    else:
        assert mine == prepared(SFT, tmp_path, conversations(), **shared) and len(mine) == 40
        assert told == ["train: 30 of 40 rows were cut to 24 tokens, and 960 of 1600 scored tokens with them."]


@pytest.mark.parametrize("max_length", [24, 4])
def test_keep_start_is_what_sfttrainer_does_to_prompts_with_answers(tmp_path, max_length):
    """Also to rows whose whole answer lies beyond max_length: both leave them out."""
    rows = tiny.texts({n: 9 for n in range(CLIENTS)})
    shared = {"max_length": max_length}
    mine = prepared(FEDERATED, tmp_path, rows, overlong_prompts="keep_start", **shared)
    assert mine == prepared(SFT, tmp_path, rows, **shared)
    assert (len(mine) < len(rows)) == (max_length == 4)


@pytest.mark.parametrize("skipped", [False, True], ids=["prepared", "skip_prepare_dataset"])
def test_one_row_without_a_scored_token_does_not_end_the_run(tmp_path, caplog, skipped):
    """SFTTrainer goes on, whatever is in the row; here it is dropped with a count, and the run goes on."""
    rows = tiny.tokenised().to_list()
    rows[3]["labels"] = [-100] * len(rows[3]["labels"])
    rows = Dataset.from_list(rows)
    given = {"dataset_kwargs": {"skip_prepare_dataset": skipped}}
    with caplog.at_level(logging.WARNING, logger="fslora_hf"):
        mine = prepared(FEDERATED, tmp_path, rows, **given)
    expected = rows.select_columns(["input_ids", "labels"]).to_list()
    assert mine == expected[:3] + expected[4:]
    assert (
        f"train: 1 of {len(rows)} rows were dropped because none of their tokens after the first is scored."
        in caplog.messages
    )
    assert len(prepared(SFT, tmp_path, rows, **given)) in (len(rows), len(rows) - 1)
