"""Tokenised rows: what of them is scored, how they are fitted to a length, and a digest that names them."""

import hashlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from datasets import Dataset

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Survey:
    """Int64 arrays `[rows]`: tokens, position of the first scored token (-1 if none), and tokens that have a loss
    (scored ones but for the first of the row, which nothing predicts)."""

    tokens: np.ndarray
    first_scored: np.ndarray
    with_loss: np.ndarray

    def of(self, rows: np.ndarray) -> "Survey":
        """The survey of a choice of rows."""
        return Survey(self.tokens[rows], self.first_scored[rows], self.with_loss[rows])


def survey_rows(dataset: Dataset) -> Survey:
    """Survey the `labels` column of a tokenised data set, whose ignored tokens are -100."""
    parts = [_survey_labels(values, offsets) for values, offsets in _ragged_batches(dataset, "labels")]
    if not parts:
        return Survey(*(np.zeros(0, dtype=np.int64) for _ in range(3)))
    return Survey(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def fit_rows(dataset: Dataset, name: str, max_length: int | None, overlong_prompts: str, bos_token_id: int | None):
    """The rows at no more than `max_length` tokens, each with a token that has a loss; returns the data set.

    A row whose first token is scored is plain text and loses its end. Any other row is a prompt with an answer:

    - `overlong_prompts="truncate"`: its prompt loses its beginning (but for a leading `bos_token_id`), or the row is
      dropped when its answer leaves no room for a token of prompt before it. No answer is cut.
    - `"drop"`: the row is dropped.
    - `"keep_start"`: it loses its end, answers too, as with SFTTrainer.

    What is cut and dropped is told with counts of rows and of scored tokens.
    """
    survey = survey_rows(dataset)
    if max_length is None:
        return drop_unscored(dataset, name, survey)
    excess = np.maximum(survey.tokens - max_length, 0)
    prompted = (survey.first_scored > 0) & (overlong_prompts != "keep_start")
    lost = prompted & (excess > 0) & ((overlong_prompts == "drop") | (survey.first_scored <= excess))
    cut = (excess > 0) & ~lost
    scored = survey.with_loss.sum()
    if cut.any():
        fields = {"cut": excess, "prompted": prompted, "max_length": max_length, "bos": bos_token_id}
        dataset = dataset.map(_cut_row, with_indices=True, fn_kwargs=fields, desc=f"Cutting {name} rows")
        survey = survey_rows(dataset)
        text = "%s: %d of %d rows were cut to %d tokens, and %d of %d scored tokens with them."
        logger.warning(text, name, cut.sum(), len(cut), max_length, scored - survey.with_loss.sum(), scored)
    if lost.any():
        text = "%s: %d of %d rows were dropped because %s, and %d of %d scored tokens with them%s."
        why = f"they are longer than {max_length} tokens"
        if overlong_prompts == "truncate":
            why = f"they are longer than {max_length} tokens without the prompt before their first answer"
        remedy = "; set overlong_prompts to keep_start to have their ends cut instead, as SFTTrainer does"
        logger.warning(text, name, lost.sum(), len(lost), why, survey.with_loss[lost].sum(), scored, remedy)
        dataset, survey = dataset.select(np.flatnonzero(~lost)), survey.of(~lost)
    return drop_unscored(dataset, name, survey)


def drop_unscored(dataset: Dataset, name: str, survey: Survey | None = None) -> Dataset:
    """The rows with a token that has a loss; the others are dropped with a count.

    Rows that are not prepared, without labels, are left for others to tell.
    """
    if "labels" not in dataset.column_names:
        return dataset
    scored = (survey or survey_rows(dataset)).with_loss > 0
    if scored.all():
        return dataset
    text = "%s: %d of %d rows were dropped because none of their tokens after the first is scored."
    logger.warning(text, name, (~scored).sum(), len(scored))
    return dataset.select(np.flatnonzero(scored))


def digest_rows(dataset: Dataset, client_id_column: str) -> str:
    """A hash of the prepared tokens, labels and client ids in order: two data sets that train alike share it."""
    digest = hashlib.blake2b(digest_size=16)
    for column in ("input_ids", "labels"):
        for values, offsets in _ragged_batches(dataset, column):
            digest.update(np.diff(offsets).astype("<i8").tobytes())
            digest.update(values.astype("<i8", copy=False).tobytes())
    digest.update(column_to_numpy(dataset, client_id_column).astype("<i8", copy=False).tobytes())
    return digest.hexdigest()


def column_to_numpy(dataset: Dataset, column: str) -> np.ndarray:
    """A flat column as an array `[rows]`, in the data set's order."""
    parts = [table[column].to_numpy() for table in dataset.select_columns([column]).with_format("arrow").iter(100_000)]
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)


def _cut_row(row, index, cut, prompted, max_length, bos):
    excess = int(cut[index])
    if excess == 0:
        return {"input_ids": row["input_ids"], "labels": row["labels"]}
    if not prompted[index]:
        return {"input_ids": row["input_ids"][:max_length], "labels": row["labels"][:max_length]}
    tokens, labels = row["input_ids"][excess:], row["labels"][excess:]
    if row["input_ids"][0] == bos and bos is not None and labels[1] == -100 and labels[0] == -100:
        tokens = [bos, *tokens[1:]]
    return {"input_ids": tokens, "labels": labels}


def _survey_labels(labels: np.ndarray, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    tokens = np.diff(offsets)
    scored = np.flatnonzero(labels != -100)
    row_of_scored = np.searchsorted(offsets, scored, side="right") - 1
    counts = np.bincount(row_of_scored, minlength=len(tokens))
    first = np.full(len(tokens), -1, dtype=np.int64)
    # Written backwards, so that the first scored token of a row is the one that stays.
    first[row_of_scored[::-1]] = (scored - offsets[row_of_scored])[::-1]
    return tokens, first, counts - (first == 0)


def _ragged_batches(dataset: Dataset, column: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The column's lists as flat values and offsets `[rows + 1]`, some ten thousand rows at a time."""
    for table in dataset.select_columns([column]).with_format("arrow").iter(batch_size=20_000):
        lists = table[column].combine_chunks()
        if isinstance(lists, pa.ChunkedArray):
            lists = lists.chunk(0)
        offsets = lists.offsets.to_numpy().astype(np.int64)
        yield lists.flatten().to_numpy(), offsets - offsets[0]
