"""Which option a model finds most likely, and how likely it finds the right completions.

Options are scored as text that completes the prompt: the log-likelihood of an option is the sum over its tokens and
the closing end-of-sequence token, which is what training maximises for the right one. What the options of a question
have in common, the prompt and the start of the completion, passes through the model once; only the differing ends
follow on its key-value cache. No logits are computed for positions that are not scored.
"""

import logging
import math
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from datasets import Dataset
from torch import nn
from transformers import Cache, PreTrainedTokenizerBase

from ..data.prompts import completions, options

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """One scored question. `choice` is None if a log-likelihood is not a number; the question then counts as wrong."""

    task: str
    options: tuple[str, ...]
    log_likelihoods: tuple[float, ...]  # in nats, one for each option
    tokens: tuple[int, ...]  # that each option's log-likelihood sums over
    choice: str | None
    answer: str

    @property
    def correct(self) -> bool:
        return self.choice == self.answer


@dataclass(frozen=True)
class TaskScore:
    """Accuracy on one task beside what answering always the same would reach, both as shares of 1."""

    accuracy: float
    standard_error: float
    majority_rate: float
    rows: int
    invalid: int  # questions with a log-likelihood that is not a number


@dataclass(frozen=True)
class Scores:
    """`outcomes` in the order of the dataset; `tasks` by name, in the order of first appearance."""

    outcomes: list[Outcome]
    tasks: dict[str, TaskScore]


@dataclass(frozen=True)
class Losses:
    """Mean loss in nats per completion token, over all rows and over the rows of each task."""

    overall: float
    tasks: dict[str, float]
    tokens: int


@dataclass(frozen=True)
class _Question:
    """Token ids of one row: a `shared` beginning, whose first `given` are not scored, and the rest of each option."""

    shared: list[int]
    given: int
    ends: list[list[int]]


def score_options(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset,
    batch_size: int = 8,
    max_length: int | None = None,
    append_eos: bool = True,
) -> Scores:
    """Chooses the most likely option of every row; of equally likely ones, the first.

    Args:
        model: a causal language model of transformers, plain or wrapped by PEFT, scored as its adapters stand.
        dataset: rows with the texts `prompt`, `completion`, `task` and `answer`, as `load_commonsense` gives them.
        batch_size: questions in one forward pass; it changes speed, memory and rounding only.
        max_length: refuse rows longer than this many tokens, for instance the length the model was trained for.
        append_eos: score the end-of-sequence token after an option, as training does.

    Raises:
        ValueError: a row's answer is not one of its options, a row is too long, or the tokenizer merges characters
            across the end of a prompt.
    """
    rows = _rows(dataset, "prompt", "completion", "task", "answer")
    questions = [
        _question(tokenizer, row["prompt"], completions(row), max_length, append_eos, number)
        for number, row in enumerate(rows)
    ]
    likelihoods = _score(model, questions, batch_size)
    outcomes = [_outcome(*each) for each in zip(rows, likelihoods, questions, strict=True)]
    by_task = _group([outcome.task for outcome in outcomes], outcomes)
    scores = Scores(outcomes, {task: _task_score(group) for task, group in by_task.items()})
    invalid = sum(score.invalid for score in scores.tasks.values())
    if invalid:
        logger.warning(
            "%d of %d questions have an option whose log-likelihood is not a number; they count as wrong.",
            invalid,
            len(rows),
        )
    return scores


def held_out_loss(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset,
    batch_size: int = 8,
    max_length: int | None = None,
) -> Losses:
    """Mean loss of the tokens of the rows' completions with their end-of-sequence token.

    `dataset` has the texts `prompt` and `completion`, and `task` where losses by task are wanted; the other arguments
    and the errors are those of `score_options`.
    """
    rows = _rows(dataset, "prompt", "completion")
    questions = [
        _question(tokenizer, row["prompt"], [row["completion"]], max_length, True, number)
        for number, row in enumerate(rows)
    ]
    losses = [-likelihoods[0] for likelihoods in _score(model, questions, batch_size)]
    tokens = [len(question.shared) - question.given for question in questions]
    pairs = list(zip(losses, tokens, strict=True))
    by_task = _group([row["task"] for row in rows], pairs) if "task" in dataset.column_names else {}
    return Losses(_token_mean(pairs), {task: _token_mean(group) for task, group in by_task.items()}, sum(tokens))


def answer_losses(scores: Scores) -> Losses:
    """What `held_out_loss` would find on rows that were scored with their end-of-sequence token, at no cost."""
    pairs, tasks = [], [outcome.task for outcome in scores.outcomes]
    for outcome in scores.outcomes:
        right = outcome.options.index(outcome.answer)
        pairs.append((-outcome.log_likelihoods[right], outcome.tokens[right]))
    by_task = {task: _token_mean(group) for task, group in _group(tasks, pairs).items()}
    return Losses(_token_mean(pairs), by_task, sum(tokens for _, tokens in pairs))


def majority_rate(answers: Sequence[Hashable]) -> float:
    """Share of the most common answer: the accuracy of always giving that one."""
    return max(Counter(answers).values()) / len(answers)


def standard_error(p: float, n: int) -> float:
    """Standard error of a share `p` seen in `n` independent questions, sqrt(p (1 - p) / n)."""
    return math.sqrt(p * (1 - p) / n)


def _rows(dataset: Dataset, *columns: str) -> list[dict]:
    missing = [column for column in columns if column not in dataset.column_names]
    if missing or len(dataset) == 0:
        raise ValueError(
            f"Expected a dataset with rows and the columns {', '.join(columns)}, found {len(dataset)} rows and the "
            f"columns {', '.join(dataset.column_names)}: load one with load_commonsense or load_miniature."
        )
    return list(dataset)


def _question(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    texts: list[str],
    max_length: int | None,
    append_eos: bool,
    number: int,
) -> _Question:
    """Tokens of `prompt` followed by each of `texts`, with the beginning that all have in common set apart."""
    end = (tokenizer.eos_token or "") if append_eos else ""
    given = tokenizer(prompt)["input_ids"]
    sequences = tokenizer([prompt + text + end for text in texts])["input_ids"]
    longest = max(len(ids) for ids in sequences)
    if max_length is not None and longest > max_length:
        raise ValueError(
            f"Expected rows of at most {max_length} tokens, found {longest} in row {number} (from 0): raise "
            "max_length or leave the row out."
        )
    if not given or any(ids[: len(given)] != given or len(ids) == len(given) for ids in sequences):
        raise ValueError(
            "Expected a prompt with tokens that stay the same when a completion follows, found that the tokenizer "
            f"merges across the end of the prompt in row {number} (from 0): end the prompt on a token boundary."
        )
    # The last token is left to the ends, so that every option of several has one.
    reach = min(len(ids) for ids in sequences) - (len(sequences) > 1)
    common = next((i for i in range(reach) if len({ids[i] for ids in sequences}) > 1), reach)
    return _Question(sequences[0][:common], len(given), [ids[common:] for ids in sequences])


def _score(model: nn.Module, questions: list[_Question], batch_size: int) -> list[list[float]]:
    """The log-likelihood of every option of every question, in the questions' order.

    Questions of like length share a batch, so that little is computed for padding. Not in inference mode: a model may
    keep what it computes here, such as 4-bit weights repacked for a processor, and go on training with it.
    """
    if batch_size < 1:
        raise ValueError(f"Expected a batch size of at least 1, found {batch_size}: ask for one question or more.")
    order = sorted(range(len(questions)), key=lambda i: -len(questions[i].shared))
    results: list[list[float]] = [[]] * len(questions)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            for start in range(0, len(order), batch_size):
                batch = order[start : start + batch_size]
                for i, likelihoods in zip(batch, _score_batch(model, [questions[i] for i in batch]), strict=True):
                    results[i] = likelihoods
    finally:
        model.train(was_training)
    return results


def _score_batch(model: nn.Module, questions: list[_Question]) -> list[list[float]]:
    """Log-likelihoods of one batch: the shared beginnings in one pass, the options' ends in a second on its cache."""
    device = next(model.parameters()).device
    ids, mask = _pad([question.shared for question in questions], device, left=True)
    scored = [len(question.shared) - question.given for question in questions]
    # Each token is predicted at the position before it, the first of an end at the last shared position.
    output = model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=(mask.cumsum(1) - 1).clamp(min=0),
        logits_to_keep=max(scored) + 1,
        use_cache=True,
    )
    log_probs = _log_softmax(output.logits)  # [questions, max(scored) + 1, vocabulary]
    _, scored_mask = _pad([[0] * count for count in scored], device, left=True)
    totals = _likelihoods(log_probs[:, :-1], ids[:, ids.shape[1] - max(scored) :], scored_mask)
    if questions[0].ends != [[]]:
        totals = _add_ends(model, questions, totals, log_probs[:, -1], mask, output.past_key_values)
    values = iter(totals.tolist())
    return [[next(values) for _ in question.ends] for question in questions]


def _add_ends(
    model: nn.Module,
    questions: list[_Question],
    shared: torch.Tensor,
    following: torch.Tensor,
    mask: torch.Tensor,
    cache: Cache,
) -> torch.Tensor:
    """Log-likelihoods of all options `[options of all questions]`.

    Args:
        shared: log-likelihoods of the shared tokens, `[questions]`.
        following: log-probabilities of the token after them, `[questions, vocabulary]`.
        mask: their attention mask, `[questions, length]`.
        cache: their keys and values; repeated here for each option.
    """
    owners = torch.tensor([i for i, question in enumerate(questions) for _ in question.ends], device=mask.device)
    ends, ends_mask = _pad([end for question in questions for end in question.ends], mask.device)
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


def _pad(sequences: list[list[int]], device: torch.device, left: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask (1 on tokens), int64 `[sequences, longest]` each; the id under a zero of the mask means nothing."""
    longest = max(len(ids) for ids in sequences)
    ids = torch.zeros(len(sequences), longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for i, sequence in enumerate(sequences):
        start = longest - len(sequence) if left else 0
        ids[i, start : start + len(sequence)] = torch.tensor(sequence, dtype=torch.int64)
        mask[i, start : start + len(sequence)] = 1
    return ids.to(device), mask.to(device)


def _log_softmax(logits: torch.Tensor) -> torch.Tensor:
    """Normalised in at least float32, also when the model computes in half precision."""
    return torch.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), dim=-1)


def _likelihoods(log_probs: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Sums over the tokens under the mask: `[n, t, vocabulary]`, `[n, t]`, `[n, t]` -> `[n]`."""
    picked = log_probs.gather(2, ids[:, :, None])[:, :, 0]
    return torch.where(mask.bool(), picked, 0).sum(1)


def _outcome(row: dict, likelihoods: list[float], question: _Question) -> Outcome:
    names = options(row)
    # max keeps the first of equals.
    best = None if any(map(math.isnan, likelihoods)) else names[max(range(len(names)), key=likelihoods.__getitem__)]
    tokens = tuple(len(question.shared) - question.given + len(end) for end in question.ends)
    return Outcome(row["task"], tuple(names), tuple(likelihoods), tokens, best, row["answer"])


def _task_score(outcomes: list[Outcome]) -> TaskScore:
    rows = len(outcomes)
    accuracy = sum(outcome.correct for outcome in outcomes) / rows
    return TaskScore(
        accuracy=accuracy,
        standard_error=standard_error(accuracy, rows),
        majority_rate=majority_rate([outcome.answer for outcome in outcomes]),
        rows=rows,
        invalid=sum(outcome.choice is None for outcome in outcomes),
    )


def _token_mean(pairs: list[tuple[float, int]]) -> float:
    """From (summed loss, tokens) of each row."""
    return sum(loss for loss, _ in pairs) / sum(tokens for _, tokens in pairs)


def _group(names: Sequence[str], items: Sequence) -> dict[str, list]:
    groups: dict[str, list] = {}
    for name, item in zip(names, items, strict=True):
        groups.setdefault(name, []).append(item)
    return groups
