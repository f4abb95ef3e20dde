"""The client index against a dictionary."""

from dataclasses import fields

import numpy as np
import pytest
from datasets import Dataset, Value

from fslora_hf.data.clients import ClientIndex

# Sparse ids, both signs, near the ends of int64.
COLUMN = np.random.default_rng(0).choice(np.array([-(2**63), -7, 0, 3, 10**12, 2**63 - 1]), size=200)


def test_index_equals_a_dictionary_of_lists():
    owned: dict[int, list[int]] = {}
    for row, client in enumerate(COLUMN.tolist()):
        owned.setdefault(client, []).append(row)
    index = ClientIndex.from_column(COLUMN)
    assert len(index) == 6 and index.ids.tolist() == sorted(owned)
    assert [index.shard(i).tolist() for i in range(len(index))] == [owned[client] for client in sorted(owned)]
    assert index.sizes.tolist() == [len(owned[client]) for client in sorted(owned)]
    assert sorted(index.rows.tolist()) == list(range(200))


@pytest.mark.parametrize("dtype", [np.int8, np.uint16, np.int32, np.uint64])
def test_index_takes_every_integer_type(dtype):
    index = ClientIndex.from_column(np.array([5, 3, 5], dtype=dtype))
    assert index.ids.tolist() == [3, 5] and index.shard(1).tolist() == [0, 2]
    assert index.ids.dtype == index.offsets.dtype == index.rows.dtype == np.int64


def test_a_million_sparse_clients_are_three_arrays():
    column = np.arange(1_000_000)[::-1] * 7919 - 10**9
    index = ClientIndex.from_column(column)
    arrays = [getattr(index, field.name) for field in fields(index)]
    assert set(vars(index)) == {"ids", "offsets", "rows"}
    assert all(type(array) is np.ndarray and array.dtype == np.int64 for array in arrays)
    assert sum(array.nbytes for array in arrays) == 8 * (3 * 1_000_000 + 1)
    assert index.ids[0] == -(10**9) and index.shard(0).tolist() == [999_999]


def test_shards_are_views_that_nobody_can_change():
    index = ClientIndex.from_column(COLUMN)
    assert np.shares_memory(index.shard(2), index.rows)
    for array in (index.shard(2), index.ids, index.offsets):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1


@pytest.mark.parametrize("position", [-1, 6])
def test_shard_refuses_a_position_outside(position):
    with pytest.raises(IndexError, match=rf"Expected the position of a client from 0 to 5, found {position}"):
        ClientIndex.from_column(COLUMN).shard(position)


@pytest.mark.parametrize(
    "column, message",
    [
        ([0.0, 1.0], r"Expected integers in 'client_id', found float64 \(.*0\.0.* in row 0\): cast"),
        (["ann", "bob"], r"Expected integers in 'client_id', found <U3 \(.*'ann'.*\): .*partition\(dataset, 'column'"),
        ([True, False], r"Expected integers in 'client_id', found bool"),
        (
            [0, None, None],
            r"Expected an integer in 'client_id' in every row, found none in 2 of 3 rows, .* row 1: drop",
        ),
        ([0.0, 4.0, np.nan], r"Expected an integer in 'client_id' in every row, found none in 1 of 3 rows, .* row 2"),
        ([2**70, 1], r"Expected integers in 'client_id', found object"),
        (np.array([2**63], dtype=np.uint64), r"Expected ids below 2\*\*63 in 'client_id', found 9223372036854775808"),
        ([], r"Expected one id in 'client_id' for each row, found shape \(0,\)"),
        ([[1, 2]], r"Expected one id in 'client_id' for each row, found shape \(1, 2\)"),
    ],
)
def test_index_says_what_is_no_client_id(column, message):
    with pytest.raises(ValueError, match=message) as error:
        ClientIndex.from_column(column)
    assert "\n" not in str(error.value)


def test_index_reads_a_data_set_through_selection_and_format():
    rows = Dataset.from_dict({"owner": [4, 9, 4, 2], "text": list("abcd")})
    index = ClientIndex.from_dataset(rows.select([3, 2, 1]).with_format("torch"), "owner")
    assert index.ids.tolist() == [2, 4, 9] and [index.shard(i).tolist() for i in range(3)] == [[0], [1], [2]]


@pytest.mark.parametrize(
    "values, message",
    [
        ({"text": ["a"]}, r"Expected a column 'client_id' in the data set, found \['text'\]: name .* or add"),
        ({"client_id": [1, None, 3]}, r"Expected an integer in 'client_id' in every row, found none in 1 of 3 rows"),
        ({"client_id": ["ann", None]}, r"Expected an integer in 'client_id' in every row, found none in 1 of 2 rows"),
        ({"client_id": ["ann"]}, r"Expected integers in 'client_id', found object \('ann' in row 0\)"),
        ({"client_id": [[1], [2]]}, r"Expected integers in 'client_id', found object"),
        ({"client_id": [0.5]}, r"Expected integers in 'client_id', found float64"),
    ],
)
def test_index_says_what_is_wrong_with_a_data_set(values, message):
    with pytest.raises(ValueError, match=message):
        ClientIndex.from_dataset(Dataset.from_dict(values))


def test_index_of_an_empty_data_set_is_an_error():
    empty = Dataset.from_dict({"client_id": []}).cast_column("client_id", Value("int64"))
    with pytest.raises(ValueError, match=r"Expected one id in 'client_id' for each row, found shape \(0,\)"):
        ClientIndex.from_dataset(empty)
