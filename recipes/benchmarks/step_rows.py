"""What timed steps have in common: the rows, what of them a step saw, and what the trainer is told."""

import argparse

RANDOM = "random"
# SFTTrainer recomputes activations unless told not to.
QUIET = dict(bf16=False, activation_checkpointing=False, report_to="none", disable_tqdm=True, logging_steps=1000,
             max_length=None, learning_rate=1e-4, lr_scheduler_type="constant")  # fmt: skip


def add_rows_option(parser: argparse.ArgumentParser) -> None:
    """Which rows; beside `--model`, `--batch_size` and `--clients`."""
    parser.add_argument(
        "--rows",
        default=RANDOM,
        help="miniature, or a folder of rows, as recipes take them, in place of random tokens; their lengths are then "
        "their own, and --model must be a folder with a tokenizer",
    )


def rows_and_tokenizer(options: argparse.Namespace, vocabulary: int):
    """What the trainers' constructors take."""
    if options.rows == RANDOM:
        return make_rows(options, vocabulary), make_tokenizer()
    from transformers import AutoTokenizer

    return real_rows(options), AutoTokenizer.from_pretrained(options.model)


def make_rows(options: argparse.Namespace, vocabulary: int):
    """Random tokens: how fast a step is does not depend on which they are."""
    import numpy as np
    from datasets import Dataset

    rows = options.clients * options.batch_size * 4
    tokens = np.random.default_rng(0).integers(10, vocabulary, (rows, options.length))
    labels = tokens.copy()
    if options.scored == "completion":
        labels[:, : -options.completion] = -100
    owners = np.arange(rows) % options.clients
    columns = {"input_ids": tokens.tolist(), "labels": labels.tolist(), "client_id": owners.tolist()}
    return Dataset.from_dict(columns)


def real_rows(options: argparse.Namespace):
    """Rows of all tasks, dealt to clients in turn."""
    import numpy as np

    from fslora_hf.data.sources import load_rows

    rows = load_rows(options.rows, "train").shuffle(seed=0)
    rows = rows.select(range(min(len(rows), options.clients * options.batch_size * 32)))
    owners = np.arange(len(rows)) % options.clients
    return rows.select_columns(["prompt", "completion"]).add_column("client_id", owners)


def tokenised_rows(rows, tokenizer, scored: str):
    """Prompts and completions as tokens and labels, for trainers that are told to leave rows as they are; `scored` is
    which tokens have a loss."""

    def tokenise(row):
        prompt = tokenizer(row["prompt"])["input_ids"]
        completion = tokenizer(row["completion"] + tokenizer.eos_token, add_special_tokens=False)["input_ids"]
        hidden = [-100] * len(prompt) if scored == "completion" else prompt
        return {"input_ids": prompt + completion, "labels": hidden + completion}

    return rows.map(tokenise, remove_columns=["prompt", "completion"])


def make_tokenizer():
    """A tokenizer for the trainers' constructors; the rows are tokens already."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1}, unk_token="</s>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>")


class CountingCollator:
    """Collates as `collator` does, and notes of each batch, in order, its tokens and how many of them have a loss;
    padding is neither."""

    def __init__(self, collator):
        self._collator, self.tokens, self.scored = collator, [], []

    def __call__(self, rows):
        batch = self._collator(rows)
        self.tokens.append(int(batch["attention_mask"].sum()))
        self.scored.append(int((batch["labels"][:, 1:] != -100).sum()))
        return batch
