"""Which option a model finds most likely, and how likely it finds the right completions.

Options are scored as text that completes the prompt: the log-likelihood of an option is the sum over the tokens of its
completion, without an end-of-sequence token, as lm-evaluation-harness has it. What the options of a question have in
common, the prompt and the start of the completion, passes through the model once; only the differing ends follow on
its key-value cache, and where these are one token each, nothing follows. What the questions of a batch have in common,
the beginning of their instruction, passes through the model once for all of them. No logits are computed for positions
that are not scored.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers import Cache, PreTrainedTokenizerBase

from ..data.prompts import completions, options
from .batches import checked_rows, device_of, pad, prompt_tokens, refuse_long
from .modes import scoring
from .outcomes import Outcome, question_id

_WORTH_SHARING = 4  # tokens; a pass of its own over fewer costs more than it saves


@dataclass(frozen=True)
class Losses:
    """Mean loss in nats per completion token, over all rows and over the rows of each task."""

    overall: float
    tasks: dict[str, float]
    tokens: int


@dataclass(frozen=True)
class _Texts:
    """Token ids of one row: a `shared` beginning, whose first `given` are not scored, and the rest of each text."""

    shared: list[int]
    given: int
    ends: list[list[int]]


@dataclass(frozen=True)
class _Question:
    row: Mapping[str, str]
    texts: _Texts


class Loglikelihood:
    """The most likely option, of equally likely ones the first; `choice_norm` by log-likelihood per character."""

    name = "loglikelihood"
    settings: Mapping[str, Any] = {}

    def prepare(
        self, tokenizer: PreTrainedTokenizerBase, dataset: Dataset, max_length: int | None = None
    ) -> list[_Question]:
        """One question a row, tokenised. All that can be wrong with a row is told here, before anything is computed.

        Raises:
            ValueError: a row lacks a usable answer or repeats an option, is longer than `max_length` tokens, or the
                tokenizer merges characters across the end of its prompt.
        """
        rows = checked_rows(dataset, "prompt", "completion", "task", "answer")
        texts = _tokenise(tokenizer, [row["prompt"] for row in rows], [completions(row) for row in rows], max_length)
        return [_Question(*pair) for pair in zip(rows, texts, strict=True)]

    def cost(self, question: _Question) -> int:
        """Tokens that pass through the model."""
        return len(question.texts.shared) + sum(len(end) - 1 for end in question.texts.ends)

    def score(self, model: nn.Module, questions: Sequence[_Question]) -> list[Outcome]:
        """The outcomes of one batch."""
        likelihoods = _score_batch(model, [question.texts for question in questions])
        return [_outcome(question.row, values) for question, values in zip(questions, likelihoods, strict=True)]


def held_out_loss(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset,
    batch_size: int = 8,
    max_length: int | None = None,
) -> Losses:
    """Mean loss of the tokens of the rows' completions with their end-of-sequence token, as training has it.

    Args:
        dataset: rows with the texts `prompt` and `completion`, and `task` where losses by task are wanted.
        batch_size: rows in one forward pass; it changes speed, memory and rounding only.

    Raises:
        ValueError: as `Loglikelihood.prepare`.
    """
    rows = checked_rows(dataset, "prompt", "completion")
    end = tokenizer.eos_token or ""
    texts = _tokenise(
        tokenizer, [row["prompt"] for row in rows], [[row["completion"] + end] for row in rows], max_length
    )
    order = sorted(range(len(texts)), key=lambda i: -len(texts[i].shared))
    pairs = [(0.0, 0)] * len(texts)
    with scoring(model):
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            for i, (value,) in zip(batch, _score_batch(model, [texts[i] for i in batch]), strict=True):
                pairs[i] = (-value, len(texts[i].shared) - texts[i].given)
    by_task: dict[str, list] = {}
    for row, pair in zip(rows, pairs, strict=True):
        by_task.setdefault(row.get("task"), []).append(pair)
    tasks = {task: _token_mean(group) for task, group in by_task.items()} if "task" in dataset.column_names else {}
    return Losses(_token_mean(pairs), tasks, sum(tokens for _, tokens in pairs))


def _tokenise(
    tokenizer: PreTrainedTokenizerBase, prompts: list[str], texts: list[list[str]], max_length: int | None
) -> list[_Texts]:
    """Tokens of each prompt followed by each of its texts, with the beginning that these have in common set apart."""
    given = prompt_tokens(tokenizer, prompts)
    whole = iter(
        tokenizer([prompt + text for prompt, own in zip(prompts, texts, strict=True) for text in own])["input_ids"]
    )
    sequences = [[next(whole) for _ in own] for own in texts]
    refuse_long([max(map(len, own)) for own in sequences], max_length)
    for number, (start, own) in enumerate(zip(given, sequences, strict=True)):
        if any(ids[: len(start)] != start or len(ids) == len(start) for ids in own):
            raise ValueError(
                "Expected a prompt with tokens that stay the same when a completion follows, found that the tokenizer "
                f"merges across the end of the prompt in row {number} (from 0): end the prompt on a token boundary."
            )
    return [_set_apart(own, len(start)) for start, own in zip(given, sequences, strict=True)]


def _set_apart(sequences: list[list[int]], given: int) -> _Texts:
    # The last token is left to the ends, so that every option of several has one.
    reach = min(len(ids) for ids in sequences) - (len(sequences) > 1)
    common = next((i for i in range(reach) if len({ids[i] for ids in sequences}) > 1), reach)
    return _Texts(sequences[0][:common], given, [ids[common:] for ids in sequences])


def _score_batch(model: nn.Module, texts: list[_Texts]) -> list[list[float]]:
    """Log-likelihoods of one batch: the shared beginnings in one pass, the options' ends in a second on its cache."""
    device = device_of(model)
    prefix, cache = _share_beginning(model, texts)
    ids, own_mask = pad([text.shared[prefix:] for text in texts], device, left=True)
    mask = torch.cat([own_mask.new_ones(len(texts), prefix), own_mask], 1)
    scored = [len(text.shared) - text.given for text in texts]
    # Each token is predicted at the position before it, the first of an end at the last shared position.
    output = model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=(mask.cumsum(1) - 1).clamp(min=0)[:, prefix:],
        past_key_values=cache,
        logits_to_keep=max(scored) + 1,
        use_cache=cache is not None or any(len(end) > 1 for text in texts for end in text.ends),
    )
    log_probs = _log_softmax(output.logits)  # [texts, max(scored) + 1, vocabulary]
    _, scored_mask = pad([[0] * count for count in scored], device, left=True)
    totals = _likelihoods(log_probs[:, :-1], ids[:, ids.shape[1] - max(scored) :], scored_mask)
    if texts[0].ends != [[]]:
        totals = _add_ends(model, texts, totals, log_probs[:, -1], mask, output.past_key_values)
    values = iter(totals.tolist())
    return [[next(values) for _ in text.ends] for text in texts]


def _share_beginning(model: nn.Module, texts: list[_Texts]) -> tuple[int, Cache | None]:
    """How many tokens all texts begin with, and their keys and values, repeated for each text.

    The last token of a prompt is left out: the first token after it is predicted there. A model that looks back over a
    window only keeps no more than that of a beginning, so it is not shared.
    """
    given = [text.shared[: text.given - 1] for text in texts]
    length = next((i for i, ids in enumerate(zip(*given, strict=False)) if len(set(ids)) > 1), min(map(len, given)))
    windowed = getattr(model.config.get_text_config(), "sliding_window", None) is not None
    if len(texts) == 1 or length < _WORTH_SHARING or windowed:
        return 0, None
    ids = torch.tensor([given[0][:length]], device=device_of(model))
    cache = model(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values
    cache.batch_repeat_interleave(len(texts))
    return length, cache


def _add_ends(
    model: nn.Module,
    texts: list[_Texts],
    shared: torch.Tensor,
    following: torch.Tensor,
    mask: torch.Tensor,
    cache: Cache | None,
) -> torch.Tensor:
    """Log-likelihoods of all options `[ends of all texts]`.

    Args:
        shared: log-likelihoods of the shared tokens, `[texts]`.
        following: log-probabilities of the token after them, `[texts, vocabulary]`.
        mask: their attention mask, `[texts, length]`.
        cache: their keys and values; repeated here for each end.
    """
    owners = torch.tensor([i for i, text in enumerate(texts) for _ in text.ends], device=mask.device)
    ends, ends_mask = pad([end for text in texts for end in text.ends], mask.device)
    totals = shared[owners] + following[owners].gather(1, ends[:, :1])[:, 0]
    steps = ends.shape[1] - 1
    if steps == 0:
        return totals
    cache.batch_select_indices(owners)
    output = model(
        input_ids=ends[:, :-1],
        attention_mask=torch.cat([mask[owners], ends_mask[:, :-1]], 1),
        position_ids=mask.sum(1)[owners, None] + torch.arange(steps, device=mask.device),
        past_key_values=cache,
        use_cache=True,
    )
    return totals + _likelihoods(_log_softmax(output.logits), ends[:, 1:], ends_mask[:, 1:])


def _log_softmax(logits: torch.Tensor) -> torch.Tensor:
    """Normalised in at least float32, also when the model computes in half precision."""
    return torch.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), dim=-1)


def _likelihoods(log_probs: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Sums over the tokens under the mask: `[n, t, vocabulary]`, `[n, t]`, `[n, t]` -> `[n]`."""
    picked = log_probs.gather(2, ids[:, :, None])[:, :, 0]
    return torch.where(mask.bool(), picked, 0).sum(1)


def _outcome(row: Mapping[str, str], likelihoods: list[float]) -> Outcome:
    names = options(row)
    finite = all(map(math.isfinite, likelihoods))
    # The harness divides by the characters of the choice, without the space in front of it.
    by_character = [
        value / len(text.removeprefix(" ")) for value, text in zip(likelihoods, completions(row), strict=True)
    ]
    return Outcome(
        question=question_id(row),
        task=row["task"],
        answer=row["answer"],
        options=tuple(names),
        choice=names[_first_largest(likelihoods)] if finite else None,
        choice_norm=names[_first_largest(by_character)] if finite else None,
        log_likelihoods=tuple(likelihoods),
        finite=finite,
    )


def _first_largest(values: list[float]) -> int:
    return max(range(len(values)), key=values.__getitem__)


def _token_mean(pairs: list[tuple[float, int]]) -> float:
    """From (summed loss, tokens) of each row."""
    return sum(loss for loss, _ in pairs) / sum(tokens for _, tokens in pairs)
