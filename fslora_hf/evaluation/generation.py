"""The benchmark's own protocol: let the model write, and read its answer from the text.

Source: the published evaluation of the commonsense tasks (LLM-Adapters, Hu et al., EMNLP 2023): 4 beams, 32 new
tokens, the first match of a task's answers in the text after the response mark. Here without its sampling, which no
one can repeat.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedTokenizerBase

from ..data.prompts import options
from .batches import checked_rows, device_of, pad, prompt_tokens, refuse_long
from .outcomes import Outcome, own_answers, question_id, read_answer


@dataclass(frozen=True)
class _Question:
    row: Mapping[str, str]
    ids: list[int]


class Generate:
    """The first of a task's answers that the model's text names.

    Args:
        num_beams: beams of the search; 1 is greedy.
        max_new_tokens: tokens to write at most.
    """

    name = "generate"

    def __init__(self, num_beams: int = 4, max_new_tokens: int = 32):
        for name, value in (("num_beams", num_beams), ("max_new_tokens", max_new_tokens)):
            if value < 1:
                raise ValueError(f"Expected {name} of at least 1, found {value}: raise it.")
        self.num_beams, self.max_new_tokens = num_beams, max_new_tokens

    @property
    def settings(self) -> Mapping[str, Any]:
        return {"num_beams": self.num_beams, "max_new_tokens": self.max_new_tokens}

    def prepare(
        self, tokenizer: PreTrainedTokenizerBase, dataset: Dataset, max_length: int | None = None
    ) -> list[_Question]:
        """One question a row, tokenised; the errors are those of `Loglikelihood.prepare`."""
        rows = checked_rows(dataset, "prompt", "completion", "task", "answer")
        given = prompt_tokens(tokenizer, [row["prompt"] for row in rows])
        room = f" with {self.max_new_tokens} new ones"
        refuse_long([len(ids) + self.max_new_tokens for ids in given], max_length, room)
        self._tokenizer, self._answers = tokenizer, own_answers((row["task"], options(row)) for row in rows)
        for number, row in enumerate(rows):
            if read_answer(row["answer"], row["task"], self._answers) != row["answer"]:
                raise ValueError(
                    f"Expected an answer that a text can be found to give in the task {row['task']}, found "
                    f"{row['answer']!r} in row {number} (from 0): the benchmark's tasks have answers of their own, so "
                    "name the task otherwise."
                )
        return [_Question(*pair) for pair in zip(rows, given, strict=True)]

    def cost(self, question: _Question) -> int:
        return len(question.ids)

    def score(self, model: nn.Module, questions: Sequence[_Question]) -> list[Outcome]:
        """The outcomes of one batch."""
        ids, mask = pad([question.ids for question in questions], device_of(model), left=True)
        watch = _NotFinite(len(questions), self.num_beams)
        with _only(self._config(model), model) as config:
            written = model.generate(
                input_ids=ids,
                attention_mask=mask,
                generation_config=config,
                logits_processor=LogitsProcessorList([watch]),
            )
        texts = self._tokenizer.batch_decode(written[:, ids.shape[1] :], skip_special_tokens=True)
        return [self._outcome(*each) for each in zip(questions, texts, (~watch.seen).tolist(), strict=True)]

    def _outcome(self, question: _Question, text: str, finite: bool) -> Outcome:
        row = question.row
        return Outcome(
            question=question_id(row),
            task=row["task"],
            answer=row["answer"],
            options=tuple(options(row)),
            choice=read_answer(text, row["task"], self._answers) if finite else None,
            text=text if finite else "",
            finite=finite,
        )

    def _config(self, model: nn.Module) -> GenerationConfig:
        ends = {self._tokenizer.eos_token_id}
        own = model.generation_config.eos_token_id
        ends |= set(own if isinstance(own, list) else [own])
        ends = sorted(end for end in ends if end is not None)
        return GenerationConfig(
            num_beams=self.num_beams,
            max_new_tokens=self.max_new_tokens,
            do_sample=False,
            eos_token_id=ends or None,
            pad_token_id=ends[0] if ends else 0,
        )


@contextmanager
def _only(config: GenerationConfig, model: nn.Module) -> Iterator[GenerationConfig]:
    """Nothing but the protocol inside: `generate` fills what a configuration leaves open from the model's own, and a
    penalty on repetition there, say, would make it another protocol (transformers 5.23.0)."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    own, base.generation_config = base.generation_config, config
    try:
        yield config
    finally:
        base.generation_config = own


class _NotFinite(LogitsProcessor):
    """Notes which questions were ever given scores that are not numbers: `seen`, bool `[questions]`."""

    def __init__(self, questions: int, beams: int):
        self.shape, self.seen = (questions, beams), torch.zeros(questions, dtype=torch.bool)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        bad = (scores.isnan() | scores.isposinf()).any(-1).view(self.shape).any(-1)
        self.seen |= bad.cpu()
        return scores
