"""Rows by where they come from: files, folders, saved data sets, and the published layout in any of them."""

import errno
import json
import os
import re

import pytest
from datasets import Dataset, DatasetDict

from fslora_hf.data import load_commonsense, render_completion, render_prompt
from fslora_hf.data.sources import load_rows
from fslora_hf.data.templates import published_row
from fslora_hf.storage.disk_errors import WriteError

pytest_plugins = ("tests.support.hub_client",)

COLUMNS = ["prompt", "completion", "task", "answer"]


def published(count: int, first: int = 0) -> list[dict[str, str]]:
    return [published_row("boolq", f"is {i} even", ("true", "false"), i % 2) for i in range(first, first + count)]


def rendered(rows: list[dict[str, str]], task: str) -> list[dict[str, str]]:
    return [
        {
            "prompt": render_prompt(row["instruction"]),
            "completion": render_completion(row["output"]),
            "task": task,
            "answer": row["answer"],
        }
        for row in rows
    ]


def write(path, rows):
    """A file of rows in the format of its ending."""
    path.parent.mkdir(parents=True, exist_ok=True)
    match path.suffix:
        case ".json":
            path.write_text(json.dumps(rows))
        case ".jsonl":
            Dataset.from_list(rows).to_json(path)
        case ".csv":
            Dataset.from_list(rows).to_csv(path)
        case ".parquet":
            Dataset.from_list(rows).to_parquet(path)
    return str(path)


@pytest.mark.parametrize("name", ["mine.json", "mine.jsonl", "mine.csv", "mine.parquet", "mine/train.json"])
def test_published_rows_of_a_file_are_rendered_as_the_task_of_its_name(tmp_path, name):
    rows = load_rows(write(tmp_path / name, published(3)), "train")
    assert rows.column_names == COLUMNS and rows.to_list() == rendered(published(3), "mine")
    assert load_rows(str(tmp_path / name), "test") is None


@pytest.mark.parametrize("name", ["test", "validation"])
def test_a_file_is_held_out_if_its_name_says_so(tmp_path, name):
    file = write(tmp_path / "mine" / f"{name}.json", published(3))
    assert load_rows(file, "test").to_list() == rendered(published(3), "mine")
    with pytest.raises(ValueError, match=f"^Expected a split 'train' in .*, found {name}: name another data set"):
        load_rows(file, "train")


def test_rows_may_name_their_task_and_have_further_columns(tmp_path):
    rows = [row | {"task": f"t{i % 2}", "author": i} for i, row in enumerate(published(4))]
    file = write(tmp_path / "mine.jsonl", rows)
    expected = [row | {"task": f"t{i % 2}", "author": i} for i, row in enumerate(rendered(published(4), task="any"))]
    assert load_rows(file, "train").to_list() == expected
    assert load_rows(file, "train", tasks=["t1"]).to_list() == expected[1::2]
    with pytest.raises(ValueError, match="^Expected .*mine.jsonl to have rows of t2, found rows of t0, t1: correct"):
        load_rows(file, "train", tasks=["t1", "t2"])


def test_a_limit_draws_from_each_task_what_the_local_files_would(tmp_path):
    file = write(tmp_path / "boolq" / "train.json", published(40))
    other = [row | {"task": task} for row in published(40) for task in ("boolq", "other")]
    mixed = load_rows(write(tmp_path / "mixed.json", other), "train", rows_per_task=7, seed=5)
    expected = load_commonsense(tmp_path, ["boolq"], limit=7, seed=5).to_list()
    assert load_rows(file, "train", rows_per_task=7, seed=5).to_list() == expected
    assert [row for row in mixed if row["task"] == "boolq"] == expected
    assert mixed["task"][:].count("other") == 7
    with pytest.raises(ValueError, match="^Expected a limit of at least 1 row per task, found 0"):
        load_rows(file, "train", rows_per_task=0)


def test_rows_with_a_prompt_come_out_as_they_are(tmp_path):
    rows = [{"prompt": "a", "completion": " b", "instruction": "x", "output": "y", "answer": "z"}]
    assert load_rows(write(tmp_path / "mine.json", rows), "train").to_list() == rows
    texts = [{"text": "only"}]
    assert load_rows(write(tmp_path / "texts.csv", texts), "train").to_list() == texts


def test_a_folder_of_commonsense_tasks_needs_no_data_dir(tmp_path):
    write(tmp_path / "boolq" / "train.json", published(9))
    write(tmp_path / "piqa" / "test.json", [published_row("piqa", "do", ("a", "b"), 1)])
    chosen = {"rows_per_task": 4, "seed": 2}
    for split in ("train", "test"):
        rows = load_rows(str(tmp_path), split, **chosen)
        assert rows.to_list() == load_rows("commonsense", split, data_dir=str(tmp_path), **chosen).to_list()
    assert rows["task"][:] == ["piqa"]


def test_a_folder_of_data_files_is_the_task_of_its_name(tmp_path):
    write(tmp_path / "boolq" / "train.json", published(3))
    write(tmp_path / "boolq" / "test.json", published(2, first=3))
    for split, rows in (("train", published(3)), ("test", published(2, first=3))):
        assert load_rows(str(tmp_path / "boolq"), split).to_list() == rendered(rows, "boolq")


def test_a_saved_data_set_is_loaded_again(tmp_path):
    train, validation = Dataset.from_list(published(3)), Dataset.from_list([{"prompt": "a", "completion": "b"}])
    DatasetDict(train=train, validation=validation).save_to_disk(tmp_path / "both")
    assert load_rows(str(tmp_path / "both"), "train").to_list() == rendered(published(3), "both")
    assert load_rows(str(tmp_path / "both"), "test").to_list() == validation.to_list()
    train.save_to_disk(tmp_path / "one")
    assert load_rows(str(tmp_path / "one"), "train").to_list() == rendered(published(3), "one")
    assert load_rows(str(tmp_path / "one"), "test") is None
    Dataset.from_list(published(3), split="test").save_to_disk(tmp_path / "held_out")
    assert load_rows(str(tmp_path / "held_out"), "test").to_list() == rendered(published(3), "held_out")


def hub_rows(repo_id: str, split: str, **arguments) -> list[dict]:
    return load_rows(repo_id, split, **arguments).to_list()


def test_published_rows_of_the_hub_are_rendered_as_the_task_of_its_name(hub, on_client, tmp_path):
    files = {}
    for split, rows in (("train", published(3)), ("test", published(2, first=3))):
        write(tmp_path / f"{split}.jsonl", rows)
        files[f"{split}.jsonl"] = (tmp_path / f"{split}.jsonl").read_bytes()
    hub.add("user/questions", files, repo_type="dataset")
    assert on_client(hub_rows, "user/questions", "train") == rendered(published(3), "questions")
    assert on_client(hub_rows, "user/questions", "test") == rendered(published(2, first=3), "questions")
    with pytest.raises(
        OSError, match="^Expected user/nothing to be a folder of rows or a data set of the Hub, found "
    ):
        on_client(hub_rows, "user/nothing", "train")


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"answer": "maybe"}, "the answer 'maybe', not one of true/false,"),
        ({"output": None}, "no text in output"),
        ({"input": "a passage"}, "an input beside the instruction, which the prompt would not show,"),
    ],
)
def test_a_published_row_that_cannot_be_used_is_named(tmp_path, change, found):
    file = write(tmp_path / "mine.json", [*published(2), published(1)[0] | change])
    with pytest.raises(ValueError, match=rf"^Expected every row of .*mine.json .*, found {found} in row 2 \(from 0\)"):
        load_rows(file, "train")


def test_a_row_without_a_task_among_some_with_one(tmp_path):
    file = write(
        tmp_path / "mine.json", [row | {"task": task} for row, task in zip(published(2), ("a", None), strict=True)]
    )
    with pytest.raises(
        ValueError, match=r"^Expected a text in the column task .*, found None in row 1 \(from 0\): corr"
    ):
        load_rows(file, "train")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("mine.json", "[{]", "to hold rows as json, found .+: correct the file"),
        ("mine.parquet", "text", "to hold rows as parquet, found .+: correct the file"),
        ("mine.txt", "text", "a file that ends in .json, .jsonl, .parquet, .csv, found .*mine.txt: convert it"),
    ],
)
def test_files_that_hold_no_rows(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=f"^Expected .*{message}"):
        load_rows(str(tmp_path / name), "train")


@pytest.mark.parametrize("source", ["{}/none", "./none.json", "none.csv"])
def test_paths_where_nothing_is(tmp_path, source):
    source = source.format(tmp_path)
    with pytest.raises(
        FileNotFoundError, match=f"^Expected a file or folder of rows, found none at {re.escape(source)}"
    ):
        load_rows(source, "train")


def test_what_is_neither_a_folder_nor_on_the_hub():
    with pytest.raises(
        OSError, match="^Expected rows/of/mine to be a folder .*, found Couldn't find any data file at .*: "
    ):
        load_rows("rows/of/mine", "train")
    with pytest.raises(
        OSError, match="^Expected user/rows to be .*, found .*OfflineMode.*: correct the name, or load it once"
    ):
        load_rows("user/rows", "train")


def test_a_full_disk_is_not_taken_for_damage(tmp_path, monkeypatch):
    """Rows are copied into the cache of `datasets`, whose writer wraps what it met in an error of its own."""

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    (tmp_path / "train.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    monkeypatch.setattr("datasets.arrow_writer.ArrowWriter.finalize", full)
    for source in (tmp_path / "train.jsonl", tmp_path):
        with pytest.raises(
            WriteError,
            match="^Expected to write the cache of datasets, .*, found 'No space left on device': make room, and "
            "start again, or set HF_DATASETS_CACHE to another.$",
        ):
            load_rows(str(source), "train")
