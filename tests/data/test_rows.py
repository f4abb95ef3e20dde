"""Tokenised rows: fitting that never cuts an answer, the survey against a naive loop, and a digest of the content."""

import logging

import numpy as np
import pytest
from datasets import Dataset, List, Value, concatenate_datasets

from fslora_hf.data.rows import column_to_numpy, digest_rows, fit_rows, survey_rows
from tests.support import tiny

BOS = 7


def make_row(prompt: list[int], answer: list[int], client: int = 0) -> dict:
    return {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer, "client_id": client}


def fit(rows: list[dict], max_length: int | None = 4, overlong_prompts: str = "truncate", bos: int | None = BOS):
    return fit_rows(Dataset.from_list(rows), "train", max_length, overlong_prompts, bos).to_list()


def test_prompts_lose_their_beginning():
    assert fit([make_row([10, 11, 12, 13], [20, 21])]) == [make_row([12, 13], [20, 21])]


def test_a_leading_bos_stays():
    assert fit([make_row([BOS, 11, 12, 13], [20, 21])]) == [make_row([BOS, 13], [20, 21])]
    assert fit([make_row([BOS, 11, 12], [20, 21])], bos=None) == [make_row([11, 12], [20, 21])]
    # 7 in another place is a word like others, and the last token of a prompt is never given up for it.
    assert fit([make_row([10, BOS, 12, 13], [20, 21])]) == [make_row([12, 13], [20, 21])]
    assert fit([make_row([BOS, 11, 12], [20, 21, 22])]) == [make_row([12], [20, 21, 22])]


def test_answers_are_never_cut(caplog):
    """An answer that leaves no room for a token of its prompt goes with its row, which is counted."""
    rows = [make_row([10, 11], [20, 21, 22, 23]), make_row([10], [20, 21, 22, 23, 24]), make_row([10], [20])]
    with caplog.at_level(logging.WARNING):
        assert fit(rows) == [rows[2]]
    assert caplog.messages == [
        "train: 2 of 3 rows were dropped because they are longer than 4 tokens without the prompt before their first "
        "answer, and 9 of 10 scored tokens with them; set overlong_prompts to keep_start to have their ends cut "
        "instead, as SFTTrainer does."
    ]


@pytest.mark.parametrize("overlong_prompts", ["truncate", "drop"])
def test_every_answer_is_whole_in_random_rows(overlong_prompts):
    rng = np.random.default_rng(0)
    rows = [
        make_row(
            rng.integers(8, 99, size=rng.integers(1, 9)).tolist(), rng.integers(8, 99, size=n % 6 + 1).tolist(), n
        )
        for n in range(60)
    ]
    fitted = {row["client_id"]: row for row in fit(rows, 6, overlong_prompts)}
    assert 0 < len(fitted) < len(rows)
    for row in rows:
        answer = [label for label in row["labels"] if label != -100]
        if row["client_id"] in fitted:
            kept = fitted[row["client_id"]]
            assert len(kept["input_ids"]) == len(kept["labels"]) == min(6, len(row["labels"]))
            assert kept["input_ids"] == row["input_ids"][-6:] and kept["labels"] == row["labels"][-6:]
            assert kept["labels"][0] == -100 and [label for label in kept["labels"] if label != -100] == answer
        else:
            assert len(row["labels"]) > 6 and (overlong_prompts == "drop" or len(answer) >= 6)


def test_drop_leaves_overlong_rows_out_and_counts_them(caplog):
    rows = [make_row([10, 11, 12], [20, 21]), make_row([10, 11], [20, 21]), make_row([1] * 9, [2])]
    with caplog.at_level(logging.WARNING):
        assert fit(rows, overlong_prompts="drop") == [rows[1]]
    assert caplog.messages == [
        "train: 2 of 3 rows were dropped because they are longer than 4 tokens, and 3 of 5 scored tokens with them; "
        "set overlong_prompts to keep_start to have their ends cut instead, as SFTTrainer does."
    ]


@pytest.mark.parametrize("overlong_prompts", ["truncate", "drop", "keep_start"])
def test_plain_text_loses_its_end(caplog, overlong_prompts):
    """A row that is scored from its first token on; its first token has no loss."""
    text = make_row([], [20, 21, 22, 23, 24])
    with caplog.at_level(logging.WARNING):
        assert fit([text, make_row([], [20, 21])], overlong_prompts=overlong_prompts) == [
            make_row([], [20, 21, 22, 23]),
            make_row([], [20, 21]),
        ]
    assert caplog.messages == ["train: 1 of 2 rows were cut to 4 tokens, and 1 of 5 scored tokens with them."]


def test_keep_start_cuts_every_row_at_its_end(caplog):
    """Of several answers the first stay; a row whose answers all lay beyond goes, told with its tokens."""
    turns = {"input_ids": [9, 20, 9, 21, 22], "labels": [-100, 20, -100, 21, 22], "client_id": 0}
    rows = [turns, make_row([9, 9, 9, 9], [20, 21]), make_row([9], [20])]
    with caplog.at_level(logging.WARNING):
        kept = fit(rows, overlong_prompts="keep_start")
    assert kept == [{"input_ids": [9, 20, 9, 21], "labels": [-100, 20, -100, 21], "client_id": 0}, rows[2]]
    assert caplog.messages == [
        "train: 2 of 3 rows were cut to 4 tokens, and 3 of 6 scored tokens with them.",
        "train: 1 of 3 rows were dropped because none of their tokens after the first is scored.",
    ]


@pytest.mark.parametrize("max_length", [4, None])
def test_rows_with_nothing_to_score_are_dropped_with_a_count(caplog, max_length):
    rows = [make_row([9, 9], []), make_row([9], [20]), make_row([], [20])]
    with caplog.at_level(logging.WARNING):
        assert fit(rows, max_length) == [rows[1]]
    assert caplog.messages == [
        "train: 2 of 3 rows were dropped because none of their tokens after the first is scored."
    ]


def test_what_fits_is_left_alone(caplog):
    rows = [make_row([10], [20, 21, 22]), make_row([BOS, 11], [20])]
    for max_length in (4, 128, None):
        assert fit(rows, max_length) == rows
    assert not caplog.messages
    long = [make_row([10] * 50, [20])]
    assert fit(long, None) == long


def naive_survey(rows: list[dict]) -> list[tuple[int, int, int]]:
    survey = []
    for row in rows:
        scored = [i for i, label in enumerate(row["labels"]) if label != -100]
        survey.append((len(row["labels"]), scored[0] if scored else -1, sum(i > 0 for i in scored)))
    return survey


def test_survey_equals_a_naive_loop():
    rng = np.random.default_rng(0)
    rows = []
    for n in range(200):
        labels = rng.choice([-100, 0, 5], size=rng.integers(0, 7), p=[0.6, 0.2, 0.2]).tolist()
        rows.append({"input_ids": [1] * len(labels), "labels": labels, "client_id": n})
    dataset = Dataset.from_list(rows)
    order = rng.permutation(200)
    for found, expected in ((dataset, rows), (dataset.select(order), [rows[i] for i in order.tolist()])):
        survey = survey_rows(found)
        columns = survey.tokens, survey.first_scored, survey.with_loss
        assert list(zip(*(column.tolist() for column in columns), strict=True)) == naive_survey(expected)
        assert all(column.dtype == np.int64 for column in columns)


def test_survey_of_nothing():
    survey = survey_rows(tiny.tokenised().select([]))
    assert len(survey.tokens) == len(survey.first_scored) == len(survey.with_loss) == 0


def test_survey_crosses_batches():
    """The column is read some rows at a time; the same for rows on both sides of a boundary."""
    rows = [make_row([1] * (n % 3), [2] * (n % 2 + 1), n) for n in range(20_003)]
    survey = survey_rows(Dataset.from_list(rows))
    expected = naive_survey(rows)
    assert len(survey.tokens) == len(rows)
    for n in (0, 19_998, 19_999, 20_000, 20_001, 20_002):
        assert (survey.tokens[n], survey.first_scored[n], survey.with_loss[n]) == expected[n]


def digest(rows) -> str:
    return digest_rows(rows if isinstance(rows, Dataset) else Dataset.from_list(rows), "client_id")


def test_digest_is_equal_for_equal_content():
    """However the table is chunked, indexed, typed or padded with other columns."""
    rows = tiny.tokenised()
    expected = digest(rows)
    halves = concatenate_datasets([rows.select(range(10)), rows.select(range(10, len(rows)))])
    backwards = Dataset.from_list(rows.to_list()[::-1]).select(range(len(rows) - 1, -1, -1))
    small = rows.cast_column("input_ids", List(Value("int32")))
    other = rows.add_column("task", ["x"] * len(rows)).with_format("torch")
    assert digest(halves) == digest(backwards) == digest(small) == digest(other) == expected
    assert digest(rows.to_list()) == expected


def swap_rows(rows):
    rows[0], rows[1] = rows[1], rows[0]


def move_boundary(rows):
    rows[0]["input_ids"].append(rows[1]["input_ids"].pop(0))
    rows[0]["labels"].append(rows[1]["labels"].pop(0))


CHANGES = {
    "a token": lambda rows: rows[-1]["input_ids"].__setitem__(0, 31),
    "a label": lambda rows: rows[20]["labels"].__setitem__(-1, -100),
    "an id": lambda rows: rows[7].__setitem__("client_id", 9),
    "the order": swap_rows,
    "a row less": lambda rows: rows.pop(),
    "where a row ends": move_boundary,
}


@pytest.mark.parametrize("change", CHANGES)
def test_digest_changes_with(change):
    rows = tiny.tokenised().to_list()
    before = digest(rows)
    CHANGES[change](rows)
    assert digest(rows) != before


def test_column_to_numpy_keeps_order_and_big_ids():
    dataset = tiny.tokenised()
    order = np.random.default_rng(0).permutation(len(dataset))
    ids = np.array(dataset["client_id"])
    assert 10**12 in ids
    assert column_to_numpy(dataset.select(order), "client_id").tolist() == ids[order].tolist()
    assert column_to_numpy(dataset.select([]), "client_id").tolist() == []
