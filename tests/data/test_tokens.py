"""Rows tokenised in batches are those that SFTTrainer prepares, one by one."""

import io
from functools import partial

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from fslora_hf.data import tokens
from tests.support import tiny, worker_train

WORDS = "two and two are four\nthe answer is four"
PAIRS = [
    {"prompt": "two and two are", "completion": " four"},
    {"prompt": "two and two a", "completion": "re four</s>"},  # the last tokens of the prompt merge with the answer's
    {"prompt": "", "completion": "the answer"},
    {"prompt": "is", "completion": ""},
    {"prompt": "näh 四", "completion": "\n\nthe"},
]


def byte_pairs() -> PreTrainedTokenizerFast:
    """A tokenizer with merges over what is the boundary of a prompt."""
    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<pad>", "</s>", "<s>"]
    words.train_from_iterator(
        [WORDS] * 3, trainers.BpeTrainer(vocab_size=320, special_tokens=special, initial_alphabet=alphabet)
    )
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", pad_token="<pad>", bos_token="<s>")


def prepared(kind: type, rows: list[dict], tokenizer: PreTrainedTokenizerFast, folder, **args) -> Dataset:
    """The rows as a trainer of this kind prepares them; `client_id` names the one client."""
    rows = Dataset.from_list([{**row, "client_id": 0} for row in rows])
    given = {"output_dir": str(folder), **worker_train.QUIET, **args}
    config = SFTConfig if kind is SFTTrainer else worker_train.FederatedSketchConfig
    lora = tiny.lora_config()
    trainer = kind(
        tiny.base_model(torch.float32),
        config(**given),
        train_dataset=rows,
        processing_class=tokenizer,
        peft_config=lora,
    )
    return trainer.train_dataset


@pytest.mark.parametrize("tokenizer", [tiny.tokenizer, byte_pairs])
@pytest.mark.parametrize(
    "rows, args",
    [
        (PAIRS, {}),
        (PAIRS, {"completion_only_loss": False}),
        ([{"text": row["prompt"] + row["completion"]} for row in PAIRS], {}),
        ([{"words": row["prompt"] + "the"} for row in PAIRS], {"dataset_text_field": "words"}),
    ],
    ids=["answers", "prompts and answers", "texts", "a column of one's own"],
)
def test_rows_are_those_of_sfttrainer(tokenizer, rows, args, tmp_path, monkeypatch):
    rows = [row for row in rows if any(row.values())]
    expected = prepared(SFTTrainer, rows, tokenizer(), tmp_path, **args, max_length=None)
    calls = []
    monkeypatch.setattr("trl.trainer.sft_trainer._tokenize", lambda *a, **k: calls.append(a))
    found = prepared(worker_train.FederatedSketchTrainer, rows, tokenizer(), tmp_path, **args, max_length=None)
    assert not calls  # not one by one
    scored = [any(label != -100 for label in labels[1:]) for labels in expected["labels"]]
    assert sum(scored) >= 3
    expected = expected.select([i for i, has_loss in enumerate(scored) if has_loss])  # the others are dropped here
    expected = expected.select_columns([name for name in expected.column_names if name != "completion_mask"])  # unread
    assert found.features == expected.features and found.to_list() == expected.to_list()


def test_an_answer_begins_where_the_tokens_part(caplog):
    tokens._warn_of_merged.cache_clear()
    rows = Dataset.from_list(PAIRS)
    found = tokens.tokenise_texts(rows, byte_pairs(), "text", True, "train")
    assert caplog.messages == [
        "Some prompts end within a token of their rows: the answer is taken to begin where the tokens of prompt and "
        "row part, as SFTTrainer takes it; end prompts on a token boundary."
    ]
    prompt = byte_pairs()(PAIRS[1]["prompt"])["input_ids"]
    assert found[1]["input_ids"][: len(prompt)] != prompt
    assert found[1]["labels"].count(-100) == len(prompt) - 1


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]},
        {"messages": [{"role": "user", "content": "a"}]},
        {"text": None},
        {"text": "a", "prompt": "b", "completion": "c"},
        {"prompt": "a"},
        {"text": "a", "input_ids": [1, 2]},
    ],
    ids=str,
)
def test_rows_of_other_kinds_are_left_to_trl(row):
    rows = Dataset.from_list([row])
    assert tokens.tokenise_texts(rows, tiny.tokenizer(), "text", True, "train") is rows


def test_rows_are_counted_on_a_bar(monkeypatch):
    shown = io.StringIO()
    monkeypatch.setattr("datasets.arrow_dataset.hf_tqdm", partial(tqdm, file=shown))
    tokens.tokenise_texts(Dataset.from_list(PAIRS * 300), tiny.tokenizer(), "text", True, "train")
    assert "Tokenizing train dataset: 100%" in shown.getvalue() and "1500/1500" in shown.getvalue()
