"""Asking all questions of a data set: in batches, by several processes, with progress, from where a kill left it."""

import logging
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, Protocol

from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerBase
from transformers.utils.logging import tqdm

from ..common.draws import permutation_prefix
from ..common.processes import agree, gather, rank, world
from ..models.quantized import keep_as_stored
from ..storage.result_files import PROTOCOLS
from .generation import Generate
from .journal import Journal
from .loglikelihood import Loglikelihood
from .modes import merged, scoring
from .outcomes import Outcome, Scores, summarise

logger = logging.getLogger(__name__)


class EvaluationProtocol(Protocol):
    """How a question is asked: what `Loglikelihood` and `Generate` are. A prepared question has its row in `row`."""

    name: str
    settings: Mapping[str, Any]

    def prepare(self, tokenizer: PreTrainedTokenizerBase, dataset: Dataset, max_length: int | None) -> list: ...

    def cost(self, question: Any) -> int: ...

    def score(self, model: nn.Module, questions: Sequence[Any]) -> list[Outcome]: ...


def make_protocol(name: str, num_beams: int = 4, max_new_tokens: int = 32) -> EvaluationProtocol:
    """A protocol by its name.

    Raises:
        ValueError: there is none of this name.
    """
    if name not in PROTOCOLS:
        raise ValueError(f"Expected a protocol out of {', '.join(PROTOCOLS)}, found {name!r}: name one of them.")
    return Loglikelihood() if name == "loglikelihood" else Generate(num_beams, max_new_tokens)


def score_rows(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset,
    protocol: str | EvaluationProtocol = "loglikelihood",
    batch_size: int = 8,
    max_length: int | None = None,
    journal: Journal | None = None,
    questions: list | None = None,
    merge: bool = False,
    description: str = "Scoring",
) -> Scores:
    """The scores of a model on rows with options, the same in every process.

    Where torch.distributed is running, its processes share the questions; each must hold the same model. Which process
    and batch a question falls into changes nothing but rounding.

    Args:
        model: a causal language model of transformers, plain or wrapped by PEFT, scored as its adapters stand.
        dataset: rows with the texts `prompt`, `completion`, `task` and `answer`, as `load_commonsense` gives them.
        protocol: `loglikelihood`, `generate`, or an object as `make_protocol` gives it.
        batch_size: questions in one forward pass; it changes speed, memory and rounding only.
        max_length: refuse rows of more tokens; None takes the length that the model's configuration states.
        questions: what the protocol's `prepare` made of the rows before, so that it need not be made again.
        journal: keeps finished questions on disk, and gives back those of an earlier attempt.
        merge: fold LoRA adapters into the base's weights meanwhile, where these are float32 or float64 and not
            quantized, which is faster and takes the memory of the adapted layers once more. Afterwards the model is as
            it was, to the last bit.

    Raises:
        ValueError: what the protocol's `prepare` objects to, or a batch size below 1.
    """
    if batch_size < 1:
        raise ValueError(f"Expected a batch size of at least 1, found {batch_size}: ask for one question or more.")
    keep_as_stored(model)
    protocol = make_protocol(protocol) if isinstance(protocol, str) else protocol
    if questions is None:
        questions = protocol.prepare(tokenizer, dataset, max_length or longest_row(model))
    done, attempt = agree(journal.read if journal else lambda: ({}, 1))
    sizes = [(question.row["task"], protocol.cost(question)) for question in questions]
    batches = _batches(sizes, set(done), batch_size)[rank() :: world()]
    if journal:
        journal.open(attempt, rank())
    folded = merged(model) if merge else nullcontext()
    try:
        with scoring(model), folded, _Progress(len(questions), len(done), description) as progress:
            new = _ask(model, protocol, questions, batches, journal, progress)
    finally:
        if journal:
            journal.close()
    found = done | {row: outcome for part in gather(new) for row, outcome in part.items()}
    scores = summarise(protocol.name, [found[i] for i in range(len(questions))])
    scores = replace(scores, resumed=len(done))
    if scores.not_finite and rank() == 0:
        text = "In %d of %d questions the model computed something that is not a number; they count as wrong."
        logger.warning(text, scores.not_finite, len(questions))
    return scores


def _ask(
    model: nn.Module,
    protocol: EvaluationProtocol,
    questions: list,
    batches: Sequence[Sequence[int]],
    journal: Journal | None,
    progress: "_Progress",
) -> dict[int, Outcome]:
    """The outcomes of this process's batches, by question."""
    found: dict[int, Outcome] = {}
    for batch in batches:
        outcomes = protocol.score(model, [questions[i] for i in batch])
        found |= dict(zip(batch, outcomes, strict=True))
        if journal:
            journal.append(batch, outcomes)
        progress.add(len(batch))
    return found


def longest_row(model: nn.Module) -> int | None:
    """The tokens of a row that the model was made for, None if its configuration does not say."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def _batches(sizes: Sequence[tuple[str, int]], done: set[int], batch_size: int) -> list[list[int]]:
    """The questions left, by their (task, tokens): one task in a batch, since its instructions begin alike, and like
    lengths, so that little is computed for padding.

    The longest batch comes first, so that a lack of memory shows at once; the others in an order that mixes lengths,
    so that the time of some tells the time of all.
    """
    by_task: dict[str, list[int]] = {}
    for i in sorted(range(len(sizes)), key=lambda i: (-sizes[i][1], i)):
        if i not in done:
            by_task.setdefault(sizes[i][0], []).append(i)
    batches = [own[start : start + batch_size] for own in by_task.values() for start in range(0, len(own), batch_size)]
    batches.sort(key=lambda batch: -sizes[batch[0]][1])
    rest = permutation_prefix(len(batches) - 1, len(batches) - 1, "evaluation") if len(batches) > 1 else []
    return batches[:1] + [batches[1 + int(i)] for i in rest]


class _Progress:
    """A bar of questions with their rate and the time left; the first process shows it for all."""

    def __init__(self, total: int, done: int, description: str):
        self.bar = tqdm(total=total, initial=done, desc=description, unit=" questions", disable=rank() != 0)
        self.left = total - done

    def __enter__(self) -> "_Progress":
        return self

    def add(self, questions: int) -> None:
        """Every process is about as far as this one."""
        step = min(questions * world(), self.left)
        self.left -= step
        self.bar.update(step)

    def __exit__(self, *reason) -> None:
        self.bar.close()
