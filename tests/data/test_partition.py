"""Partitioners: nothing lost or duplicated, fixed by the seed, each scheme by its own definition or a slow twin."""

import json
import re
from collections import Counter

import numpy as np
import pytest
from datasets import Dataset, DatasetDict, Value

from fslora_hf.data.clients import ClientIndex
from fslora_hf.data.partition import (
    _ensure_min_examples,
    dirichlet,
    iid,
    log_gammas,
    partition,
    sorted_shards,
    task_dirichlet,
)

ROWS = 600
TASK = [["arc", "boolq", "piqa"][(i * i) % 7 % 4] for i in range(ROWS)]
SCHEMES = [
    ("iid", 12, {}),
    ("dirichlet", 12, {"column": "task", "alpha": 0.05}),
    ("task_dirichlet", 12, {"column": "task", "alpha": 0.05}),
    ("sorted_shards", 12, {"column": "task"}),
    ("sorted_shards", 7, {"column": "task", "shards_per_client": 3}),
    ("column", None, {"column": "author"}),
]
DRAWN = SCHEMES[:-1]


@pytest.fixture(scope="module")
def rows() -> Dataset:
    return Dataset.from_dict(
        {
            "text": [f"row {i}" for i in range(ROWS)],
            "task": TASK,
            "author": [f"author {i % 12:02d}" for i in range(ROWS)],
            "number": [1000 - 3 * (i % 5) for i in range(ROWS)],
            "tokens": [[i, i + 1] for i in range(ROWS)],
        }
    )


def clients_of(dataset: Dataset) -> np.ndarray:
    return np.asarray(dataset["client_id"][:])


@pytest.mark.parametrize("scheme, num_clients, options", SCHEMES)
@pytest.mark.parametrize("min_examples", [1, 30])
def test_every_row_goes_to_one_client_and_each_has_enough(rows, scheme, num_clients, options, min_examples):
    split = partition(rows, scheme, num_clients, seed=3, min_examples=min_examples, **options)
    assert split.remove_columns("client_id")[:] == rows[:]
    assert split.features["client_id"] == Value("int64")
    index = ClientIndex.from_dataset(split)
    assert index.ids.tolist() == list(range(num_clients or 12))
    assert sorted(np.concatenate([index.shard(i) for i in range(len(index))]).tolist()) == list(range(ROWS))
    assert index.sizes.min() >= min_examples


@pytest.mark.parametrize("scheme, num_clients, options", DRAWN)
def test_the_seed_fixes_the_split(rows, scheme, num_clients, options):
    splits = [clients_of(partition(rows, scheme, num_clients, seed=seed, **options)).tolist() for seed in (3, 3, 4)]
    assert splits[0] == splits[1] != splits[2]


@pytest.mark.parametrize("split", [dirichlet, task_dirichlet, sorted_shards])
def test_the_seed_fixes_the_draw_itself(split):  # in the test above, the mending also draws
    labels = np.arange(ROWS) % 3
    splits = [split(labels, 12, seed=seed).tolist() for seed in (3, 3, 4)]
    assert splits[0] == splits[1] != splits[2]
    sizes = [[np.bincount(np.array(clients)[labels == 2], minlength=12).tolist()] for clients in splits]
    assert sizes[0] == sizes[1] != sizes[2]


@pytest.mark.parametrize(
    "scheme, options, golden",
    [  # what the schemes gave when they were written (no twin): were it to change, no earlier split could be repeated
        ("iid", {}, "021023121132033020321301"),
        ("dirichlet", {"column": "task", "alpha": 0.5}, "313203130320011322213001"),
        ("task_dirichlet", {"column": "task", "alpha": 0.5}, "001332020133131322323121"),
        ("sorted_shards", {"column": "task"}, "333113000012001212212323"),
    ],
)
def test_splits_never_change(rows, scheme, options, golden):
    split = partition(rows.select(range(24)), scheme, 4, seed=0, min_examples=3, **options)
    assert "".join(map(str, split["client_id"])) == golden


def test_a_selected_and_formatted_data_set_is_split_like_a_plain_one(rows):
    order = list(range(ROWS))[::-3]
    plain = Dataset.from_dict(rows[order])
    split = partition(rows.select(order).with_format("torch"), "dirichlet", 5, seed=1, column="task")
    assert clients_of(split).tolist() == clients_of(partition(plain, "dirichlet", 5, seed=1, column="task")).tolist()
    assert split.with_format(None)["text"][:] == plain["text"][:]


def test_iid_deals_equal_parts_in_no_order():
    clients = iid(10_003, 10, seed=0)
    assert sorted(np.bincount(clients).tolist()) == [1000] * 7 + [1001] * 3
    # Of the first half of the rows a client holds 500, with a standard deviation of sqrt(10000 * 0.1 * 0.9 / 4).
    assert np.abs(np.bincount(clients[:5001]) - 500).max() < 5 * np.sqrt(225)
    assert not np.array_equal(clients, np.arange(10_003) % 10)


# Dirichlet


@pytest.mark.parametrize(
    "alpha, mean, variance",  # digamma(alpha) and trigamma(alpha), from tables
    [
        (0.5, -1.9635100260214235, 4.934802200544679),
        (1.0, -0.5772156649015329, 1.6449340668482264),
        (4.0, 1.2561176684318005, 0.28382295573711525),
    ],
)
def test_log_gammas_have_their_moments(alpha, mean, variance):
    logs = log_gammas(200_000, alpha, 9, "gamma")
    assert abs(logs.mean() - mean) < 5 * np.sqrt(variance / len(logs))
    assert abs(logs.var() / variance - 1) < 0.03
    assert abs(np.exp(logs).mean() - alpha) < 5 * np.sqrt(alpha / len(logs))
    assert abs(np.exp(logs).var() / alpha - 1) < 0.03


@pytest.mark.parametrize("split", [dirichlet, task_dirichlet])
@pytest.mark.parametrize("alpha", [0.03, 0.3, 3.0])
def test_concentration_is_the_dirichlet_s(split, alpha):
    """The sum of squared shares of a label averages (alpha + 1) / (N alpha + 1) under Dirichlet(alpha)."""
    labels, per_label, n = 400, 1000, 10
    column = np.r_[np.repeat(np.arange(labels), per_label), np.full(per_label + 1, labels)]
    clients = split(column, n, seed=2, alpha=alpha)[: labels * per_label]
    shares = np.array([np.bincount(part, minlength=n) for part in clients.reshape(labels, per_label)]) / per_label
    squares = (shares**2).sum(axis=1)
    error = squares.std() / np.sqrt(labels)
    assert abs(squares.mean() - (alpha + 1) / (n * alpha + 1)) < 4 * error + 1e-3
    assert np.abs(shares.mean(axis=0) - 1 / n).max() < 5 * shares.std() / np.sqrt(labels)


def test_small_alpha_gives_a_label_to_one_client_and_large_alpha_equal_parts():
    labels = np.repeat(np.arange(50), 1001)
    alone = dirichlet(labels, 10, seed=0, alpha=1e-6).reshape(50, 1001)
    assert all(len(set(part)) == 1 for part in alone.tolist()) and len(set(alone[:, 0].tolist())) > 5
    even = dirichlet(labels, 10, seed=0, alpha=1e6).reshape(50, 1001)
    assert all(np.ptp(np.bincount(part, minlength=10)) <= 2 for part in even)
    assert len({tuple(part) for part in even.tolist()}) == 50  # each label is shuffled by itself


def test_a_label_s_deal_depends_on_itself_alone():
    labels = np.array([4] * 100 + [8] * 50)
    assert dirichlet(labels, 6, seed=1)[:100].tolist() == dirichlet(labels[:100], 6, seed=1).tolist()


def test_rows_of_a_label_are_dealt_in_no_order():
    clients = dirichlet(np.zeros(1000, dtype=np.int64), 2, seed=0, alpha=1e6)
    assert abs(np.bincount(clients[:500])[0] - 250) < 5 * np.sqrt(1000 / 16)


# The published split


def slow_fill(other_sizes: list[int], supply: int) -> list[int]:
    """What each client gets of the largest task, one row at a time: smallest first, each up to the average."""
    sizes, counts = list(other_sizes), [0] * len(other_sizes)
    target = (sum(sizes) + supply) // len(sizes)

    def give(client):
        sizes[client] += 1
        counts[client] += 1

    for client in sorted(range(len(sizes)), key=lambda i: (sizes[i], i)):
        while sizes[client] < target and sum(counts) < supply:
            give(client)
    for client in sorted(range(len(sizes)), key=lambda i: (sizes[i], i)):
        if sum(counts) < supply:
            give(client)
    assert sum(counts) == supply
    return counts


@pytest.mark.parametrize("alpha", [0.1, 1.0, 100.0])
@pytest.mark.parametrize("largest", [100, 331, 997])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_largest_task_fills_smallest_first_up_to_the_average(alpha, largest, seed):
    tasks = np.random.default_rng(seed).permutation(np.repeat([3, 5, 8, 9], [99, largest, 80, 17]))
    clients = task_dirichlet(tasks, 9, seed=seed, alpha=alpha)
    others = np.bincount(clients[tasks != 5], minlength=9)
    filling = np.bincount(clients[tasks == 5], minlength=9)
    assert filling.tolist() == slow_fill(others.tolist(), largest)


def test_filled_clients_are_equal_where_the_largest_task_suffices():
    tasks = np.repeat([0, 1, 2], [200, 5000, 103])
    sizes = np.bincount(task_dirichlet(tasks, 10, seed=0), minlength=10)
    assert sorted(sizes.tolist()) == [530] * 7 + [531] * 3


def test_rows_of_the_largest_task_fill_in_no_order():
    clients = task_dirichlet(np.zeros(1000, dtype=np.int64), 2, seed=0)
    assert abs(np.bincount(clients[:500])[0] - 250) < 5 * np.sqrt(1000 / 16)


def test_of_equal_tasks_the_first_fills():
    tasks = np.repeat([1, 2], [500, 500])
    clients = task_dirichlet(tasks, 4, seed=0, alpha=0.01)
    assert np.bincount(clients[tasks == 2], minlength=4).max() > 450  # dealt by Dirichlet
    filling = np.bincount(clients[tasks == 1], minlength=4)
    assert filling.tolist() == slow_fill(np.bincount(clients[tasks == 2], minlength=4).tolist(), 500)


def test_real_tasks_split_as_published(commonsense_dir):
    names = ["ARC-Challenge", "ARC-Easy", "boolq", "openbookqa"]
    counts = [len(json.loads((commonsense_dir / name / "train.json").read_text())) for name in names]
    rows = Dataset.from_dict({"task": [name for name, size in zip(names, counts, strict=True) for _ in range(size)]})
    split = partition(rows, "task_dirichlet", 20, seed=42, column="task", alpha=0.1)
    index = ClientIndex.from_dataset(split)
    tasks = rows["task"][:]
    held = [Counter(tasks[row] for row in index.shard(i).tolist()) for i in range(20)]
    others = [client.total() - client["boolq"] for client in held]
    assert [client["boolq"] for client in held] == slow_fill(others, counts[2])
    assert sum(held, Counter()) == Counter(dict(zip(names, counts, strict=True)))


# Sorted shards


@pytest.mark.parametrize("num_clients, shards_per_client", [(10, 2), (7, 3), (1, 4), (60, 1)])
def test_clients_hold_whole_shards_of_the_sorted_rows(num_clients, shards_per_client):
    labels = np.random.default_rng(0).integers(0, 10, 607)
    clients = sorted_shards(labels, num_clients, seed=0, shards_per_client=shards_per_client)
    shards = num_clients * shards_per_client
    dealt = Counter()
    for shard in np.split(
        clients[np.argsort(labels, kind="stable")], [-(-607 * s // shards) for s in range(1, shards)]
    ):
        assert len(set(shard.tolist())) == 1 and len(shard) in (607 // shards, 607 // shards + 1)
        dealt[int(shard[0])] += 1
    assert dealt == {client: shards_per_client for client in range(num_clients)}


def test_shards_are_dealt_at_random():
    runs = [tuple(sorted_shards(np.arange(40), 4, seed=seed).tolist()) for seed in range(20)]
    assert len(set(runs)) > 15


# An existing column


@pytest.mark.parametrize(
    "values, ids",
    [
        (["bob", "ann", "bob", "Zoe"], [2, 1, 2, 0]),
        ([-5, 10**15, -5, 7], [-5, 10**15, -5, 7]),
        ([True, False, True], [1, 0, 1]),
    ],
)
def test_an_existing_column_becomes_ids(values, ids):
    split = partition(Dataset.from_dict({"author": values}), "column", seed=0, column="author")
    assert clients_of(split).tolist() == ids and split["author"][:] == values
    assert split.features["client_id"] == Value("int64")


def test_narrow_integers_become_int64():
    narrow = Dataset.from_dict({"author": [3, 1]}).cast_column("author", Value("uint8"))
    split = partition(narrow, "column", 2, seed=0, column="author", client_id_column="owner")
    assert split.features["owner"] == Value("int64") and split["owner"][:] == [3, 1]


# The least a client may hold


def slow_mend(sizes: list[int], least: int) -> tuple[list[int], list[int]]:
    """Sizes after mending and rows given, one row at a time from the then largest client."""
    sizes, given = list(sizes), [0] * len(sizes)
    while min(sizes) < least:
        giver, taker = sizes.index(max(sizes)), sizes.index(min(sizes))
        sizes[giver], sizes[taker] = sizes[giver] - 1, sizes[taker] + 1
        given[giver] += 1
    return sizes, given


@pytest.mark.parametrize("least", [1, 4, 10, 20])
@pytest.mark.parametrize(
    "sizes", [[200, 0, 0, 0, 0], [50, 49, 1, 0, 0], [20] * 5, [3, 33, 33, 1, 30], [0, 1, 2, 3, 94]]
)
def test_mending_moves_as_few_rows_as_possible_from_the_largest(sizes, least):
    clients = np.random.default_rng(0).permutation(np.repeat(np.arange(5), sizes))
    mended = _ensure_min_examples(clients, 5, least, seed=0)
    expected, given = slow_mend(sizes, least)
    assert np.bincount(mended, minlength=5).tolist() == expected
    assert np.bincount(clients[mended != clients], minlength=5).tolist() == given
    assert (mended is not clients) and mended.dtype == np.int64


def test_the_rows_moved_are_drawn_by_the_seed():
    clients = np.zeros(1000, dtype=np.int64)
    moved = [np.flatnonzero(_ensure_min_examples(clients, 2, 100, seed=seed)) for seed in (0, 0, 1)]
    assert moved[0].tolist() == moved[1].tolist() != moved[2].tolist()
    assert abs((moved[0] < 500).sum() - 50) < 25
    assert clients.sum() == 0


def test_min_examples_equal_to_the_average_levels_everybody(rows):
    split = partition(rows, "dirichlet", 12, seed=0, column="task", alpha=0.01, min_examples=50)
    assert ClientIndex.from_dataset(split).sizes.tolist() == [50] * 12


# Bad input


@pytest.mark.parametrize(
    "scheme, num_clients, options, message",
    [
        (
            "shards",
            4,
            {},
            "Expected a scheme of ['iid', 'dirichlet', 'task_dirichlet', 'sorted_shards', 'column'], fou",
        ),
        ("iid", None, {}, "Expected num_clients to be an integer of 1 or more, found None: set it."),
        ("iid", 0, {}, "Expected num_clients to be an integer of 1 or more, found 0"),
        ("iid", True, {}, "Expected num_clients to be an integer of 1 or more, found True"),
        ("iid", 4, {"min_examples": 0}, "Expected min_examples to be an integer of 1 or more, found 0"),
        ("iid", 4, {"seed": 1.5}, "Expected seed to be an integer, found 1.5"),
        ("iid", 4, {"column": "task"}, "Expected no column for the scheme 'iid', found 'task': leave it out."),
        ("iid", 4, {"alpha": 1}, "Expected no alpha for the scheme 'iid', found 1: leave it out."),
        (
            "column",
            None,
            {"column": "author", "shards_per_client": 2},
            "Expected no shards_per_client for the scheme 'c",
        ),
        ("dirichlet", 4, {}, "Expected column= for the scheme 'dirichlet', found none: name the column to split by."),
        ("dirichlet", 4, {"column": "label"}, "Expected a column 'label' in the data set, found ['text', 'task', "),
        ("dirichlet", 4, {"column": "task", "alpha": 0}, "Expected alpha from 1e-6 to 1e6, found 0"),
        ("dirichlet", 4, {"column": "task", "alpha": float("nan")}, "Expected alpha from 1e-6 to 1e6, found nan"),
        ("dirichlet", 4, {"column": "task", "alpha": "0.1"}, "Expected alpha from 1e-6 to 1e6, found '0.1'"),
        (
            "dirichlet",
            4,
            {"column": "tokens"},
            "Expected integers, booleans or text in column 'tokens' to split by, foun",
        ),
        (
            "sorted_shards",
            4,
            {"column": "task", "shards_per_client": 0},
            "Expected shards_per_client to be an integer of",
        ),
        (
            "sorted_shards",
            400,
            {"column": "task"},
            "Expected at least 800 rows, 2 for each of 400 clients, found 600: "
            "lower num_clients or shards_per_client.",
        ),
        (
            "iid",
            61,
            {"min_examples": 10},
            "Expected at least 610 rows, 10 for each of 61 clients, found 600: lower num_clients or min_examples.",
        ),
        (
            "iid",
            4,
            {"client_id_column": "author"},
            "Expected no column 'author' in the data set yet, found one: train",
        ),
        (
            "column",
            4,
            {"column": "author"},
            "Expected 4 clients, found 12 values in column 'author': leave num_clients",
        ),
        (
            "column",
            None,
            {"column": "author", "min_examples": 51},
            "Expected at least 51 rows of each client, found 50 of client 0 (12 such clients): drop their rows",
        ),
    ],
)
def test_bad_arguments_get_one_sentence(rows, scheme, num_clients, options, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        partition(rows, scheme, num_clients, **({"seed": 0} | options))
    assert "\n" not in str(error.value)


def test_all_bad_arguments_are_reported_together(rows):
    with pytest.raises(ValueError) as error:
        partition(rows, "iid", 0, seed=None, alpha=-1, client_id_column="text", min_examples=2.5)
    found = str(error.value).splitlines()
    assert len(found) == 6 and all(line.startswith("Expected ") for line in found)


@pytest.mark.parametrize("scheme", ["dirichlet", "task_dirichlet", "sorted_shards", "column"])
@pytest.mark.parametrize("values", [["a", None, "b"], [1, None, 2]])
def test_rows_without_a_value_are_refused(scheme, values):
    rows = Dataset.from_dict({"task": values})
    with pytest.raises(ValueError, match=r"Expected an? (integer|value) .*in every row.*, found (none in )?1 "):
        partition(rows, scheme, None if scheme == "column" else 1, seed=0, column="task")


def test_only_one_whole_data_set_is_split(rows):
    for other in (DatasetDict(train=rows), rows.to_iterable_dataset(), [{"text": "a"}]):
        with pytest.raises(TypeError, match=rf"Expected a datasets.Dataset to split, found {type(other).__name__}: "):
            partition(other, "iid", 2, seed=0)
