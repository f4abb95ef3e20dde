"""Files, rows and answers of an odd shape: one sentence each, that says where, and what to do."""

import codecs
import json
import os
import re
import time

import pytest
import yaml
from datasets import Dataset

from fslora_hf import FederatedSketchTrainer
from fslora_hf.common import strict_yaml
from fslora_hf.common.settings import SettingsError
from fslora_hf.common.strict_yaml import YamlFileError, read_yaml
from fslora_hf.config.federation import FederatedSketchConfig
from fslora_hf.config.recipe import ModelArguments, RecipeArguments, parse_recipe
from fslora_hf.config.variables import variable_problems
from fslora_hf.data import load_commonsense
from fslora_hf.data.sources import load_rows
from fslora_hf.data.templates import published_row
from fslora_hf.data.texts import text_problems
from fslora_hf.hub.errors import HubError
from fslora_hf.hub.remote import Owner
from fslora_hf.launch import build_trainer, claimed
from tests.support import tiny

TYPES = (RecipeArguments, FederatedSketchConfig, ModelArguments)
HELD_BY_NONE = "A under env to have a text as its value, found one that no variable can hold"
BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 10)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"seed: " + b"[" * 5000, "more than 32 levels in line 1, column 38"),
        (b"seed: " + b"{a: " * 5000, "more than 32 levels in line 1, column 128"),
        (b"- " * 5000, "more than 32 levels in line 1, column 65"),
        (BOMB.encode(), "more than 2,000,000 values in line 7, column 4"),
        (b"a: &a [*a]", "a value that holds itself in line 1, column 8"),
        (b"a: &a {b: *a}", "a value that holds itself in line 1, column 11"),
        ("a: &a0 [x]\n" + "".join(f"b{i}: &a{i + 1} [*a{i}]\n" for i in range(99)), "more than 32 levels in line 32"),
        (b"seed: !!int x", "a value that is not what its form or its tag says in line 1, column 7"),
        (b"seed: !!bool maybe", "a value that is not what its form or its tag says in line 1, column 7"),
        (b"seed: 2020-13-45", "a value that is not what its form or its tag says in line 1, column 7"),
        (b"seed: !!python/name:os.system", "could not determine a constructor for the tag '...' in line 1, column 7"),
        (b"? [1]\n: 2", "while constructing a mapping found unhashable key in line 1, column 3"),
        (b"a: b: c", "mapping values are not allowed here in line 1, column 5"),
        (b"--- 1\n--- 2", "expected a single document in the stream but found another document in line 2, column 1"),
        (b"seed: \x00", "a character that no text has (#x0000)"),
        (b"\x7fELF\x02\x01\xff", "a byte that is no UTF-8 at place 6"),
        (codecs.BOM_UTF16_LE + "seed: 1".encode("utf-16-le"), "a byte that is no UTF-8 at place 0"),
    ],
)
def test_yaml_that_cannot_be_read(tmp_path, content, found):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    start = time.process_time()
    with pytest.raises(SettingsError) as caught:
        parse_recipe(TYPES, ["--config", str(path)])
    [text] = caught.value.problems
    assert text.startswith(f"Expected a YAML file at {path}, found {found}") and len(text) < 400
    assert text.endswith(": name another or correct it.") and time.process_time() - start < 5


def test_yaml_paths_that_are_no_files(tmp_path):
    for path, found in (
        (tmp_path, "Is a directory"),
        (tmp_path / "no", "No such file or directory"),
        ("a\0b", "embedded"),
    ):
        with pytest.raises(YamlFileError, match=f"^{found}"):
            read_yaml(path)
    with pytest.raises(YamlFileError, match="File name too long"):
        read_yaml("a" * 5000)


def test_yaml_that_is_sound_is_read_as_before(tmp_path):
    path = tmp_path / "recipe.yaml"
    text = (
        "base: &base {a: 1, b: [x, *none]}\n".replace(", *none", "")
        + "two: {<<: *base, c: 2020-01-02}\nlast: [[[1]]]\n"
    )
    path.write_bytes(codecs.BOM_UTF8 + text.encode())
    assert read_yaml(path) == (yaml.safe_load(text), [])
    path.write_text("a: {b: 1, b: 2}\nc: 1\nc: 2\nc: 3\n")
    assert read_yaml(path) == ({"a": {"b": 2}, "c": 3}, ["c", "b"])


def test_long_yaml_is_read_in_proportion(tmp_path, monkeypatch):
    path = tmp_path / "recipe.yaml"
    path.write_text("\n".join(f"k{i}: {i}" for i in range(3000)))
    assert len(read_yaml(path)[0]) == 3000
    monkeypatch.setattr(strict_yaml, "MOST", 3000)
    with pytest.raises(YamlFileError, match="^more than 3,000 values"):
        read_yaml(path)


@pytest.mark.parametrize(
    ("environment", "problem"),
    [
        ([], None),
        ({"": "x"}, "names under env to be of letters, digits and _, found : write each as NAME: value."),
        ({"A=B": "x"}, "names under env to be of letters, digits and _, found A=B: write each as NAME: value."),
        ({"A\0": "x"}, "names under env to be of letters, digits and _, found A: write each as NAME: value."),
        ({"Ä": "x"}, "names under env to be of letters, digits and _, found Ä: write each as NAME: value."),
        ({7: "x"}, "names under env to be of letters, digits and _, found 7: write each as NAME: value."),
        ({None: "x"}, "names under env to be of letters, digits and _, found None: write each as NAME: value."),
        ({"A": None}, "A under env to have a text as its value, found nothing: put it in quotes."),
        ({"A": ["x"]}, "A under env to have a text as its value, found a list: put it in quotes."),
        (
            {"A": "x\0"},
            "A under env to have a text as its value, found one that no variable can hold: put it in quotes.",
        ),
        (
            {"A": "\ud800"},
            "A under env to have a text as its value, found one that no variable can hold: put it in quotes.",
        ),
    ],
)
def test_what_no_variable_can_be(environment, problem):
    if problem is None:
        assert len([*variable_problems(environment)]) == 1 and not [*variable_problems({"A_1": 3, "b": "x", "C": ""})]
        return
    [text] = variable_problems(environment)
    assert re.sub("^Expected (the )?", "", text) == problem


def test_a_recipe_with_an_odd_variable_sets_none(tmp_path, monkeypatch):
    monkeypatch.setenv("FSLORA_ODD", "before")
    path = tmp_path / "recipe.yaml"
    path.write_text("env: {FSLORA_ODD: after, 'A B': x}\n")
    with pytest.raises(SettingsError, match="names under env"):
        parse_recipe(TYPES, ["--config", str(path)])
    assert os.environ["FSLORA_ODD"] == "before"


# ---- Rows ----


@pytest.mark.parametrize(
    ("name", "content", "found"),
    [
        ("mine.json", b"", "to hold rows as json, found an empty file: name another."),
        ("mine.csv", b"", "to hold rows as csv, found an empty file: name another."),
        ("mine.jsonl", b"\n\n", "to hold rows as jsonl, found "),
        ("mine.json", b"[]", "found "),
        ("mine.csv", b"prompt,completion\n", "found "),
        ("mine.csv", "prompt,completion\nä,ö\n".encode("latin-1"), "found text that is not UTF-8 ("),
        (
            "mine.json",
            json.dumps([{"prompt": "ä"}], ensure_ascii=False).encode("utf-16"),
            "to hold rows as json, found ",
        ),
        (
            "mine.jsonl",
            b'{"instruction": "\xff", "output": "b", "answer": "c"}\n',
            "column instruction, row 0 (from 0)",
        ),
    ],
)
def test_files_of_rows_that_cannot_be_read(tmp_path, name, content, found):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError) as caught:
        load_rows(str(path), "train")
    text = str(caught.value)
    assert text.startswith("Expected ") and found in text and "StopIteration" not in text and text.endswith(".")


@pytest.mark.parametrize("source", ["", " ", "a\0b"])
def test_a_source_that_is_no_name(source):
    with pytest.raises(OSError, match="^Expected a file, a folder or a name of the Hub, found "):
        load_rows(source, "train")


def test_a_saved_data_set_with_a_part_missing(tmp_path):
    Dataset.from_list([{"prompt": "a", "completion": "b"}]).save_to_disk(tmp_path / "saved")
    (tmp_path / "saved" / "state.json").write_text("[]")
    with pytest.raises(ValueError, match="^Expected .*saved as save_to_disk wrote it, found .*: save the"):
        load_rows(str(tmp_path / "saved"), "train")


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"[" * 10_000 + b"]" * 10_000, "to be UTF-8 JSON, found"),
        (b"", "to be UTF-8 JSON, found"),
        (b"\xff", "to be UTF-8 JSON, found"),
        (b"{}", "to hold a list of rows, found dict: download the file again."),
        (
            json.dumps([published_row("boolq", "x\ud800", ("true", "false"), 0)]).encode(),
            "found half a character in row 0",
        ),
    ],
)
def test_published_files_that_cannot_be_read(tmp_path, content, found):
    (tmp_path / "boolq").mkdir()
    (tmp_path / "boolq" / "train.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"^Expected .*\.$") as caught:
        load_commonsense(tmp_path)
    assert found in str(caught.value)


def refused(rows: list[dict], eval_rows: list[dict] | None = None, **settings) -> str:
    args = FederatedSketchConfig(output_dir="unused", use_cpu=True, bf16=False, **settings)
    train = Dataset.from_list([row | {"client_id": number % 2} for number, row in enumerate(rows)])
    held_out = eval_rows and Dataset.from_list(eval_rows)
    with pytest.raises(ValueError, match="^The run cannot start:") as caught:
        FederatedSketchTrainer("no/model", args, None, train, held_out, peft_config=tiny.lora_config(2))
    return str(caught.value)


PAIR = {"prompt": "a", "completion": "b"}
TEXT = "Expected a text or a list of messages in every row of column"


@pytest.mark.parametrize(
    ("rows", "text"),
    [
        ([PAIR, PAIR | {"prompt": None}], f"{TEXT} prompt of train_dataset, found nothing in row 1 (from 0): correct"),
        (
            [PAIR | {"completion": 5}],
            f"{TEXT} completion of train_dataset, found a value of the kind int in row 0 (from 0)",
        ),
        (
            [PAIR | {"prompt": [1, 2]}],
            f"{TEXT} prompt of train_dataset, found a list of other things in row 0 (from 0)",
        ),
        ([{"text": "a"}, {"text": None}], f"{TEXT} text of train_dataset, found nothing in row 1 (from 0)"),
        ([{"messages": None}], f"{TEXT} messages of train_dataset, found nothing in row 0 (from 0)"),
        (
            [{"input_ids": ["a"]}],
            "Expected a list of token ids in every row of column input_ids of train_dataset, found a ",
        ),
    ],
)
def test_rows_without_a_text(rows, text):
    assert text in refused(rows)


def test_held_out_rows_without_a_text():
    assert f"{TEXT} prompt of eval_dataset, found nothing in row 0" in refused([PAIR], [PAIR | {"prompt": None}, PAIR])


def test_prompts_without_completions():
    text = "Expected train_dataset to have a column completion beside prompt, found none: rename it to have another"
    assert text in refused([{"prompt": "a", "text": "b"}]) and text in refused(
        [{"prompt": "a"}], dataset_text_field="prompt"
    )


def test_held_out_rows_that_are_none(tmp_path):
    def told(held_out):
        args = FederatedSketchConfig(output_dir=str(tmp_path / "run"), use_cpu=True, bf16=False, eval_rounds=1)
        train = Dataset.from_list([PAIR | {"client_id": 0}])
        with pytest.raises(ValueError, match="^The run cannot start:") as caught:
            FederatedSketchTrainer("no/model", args, None, train, held_out, peft_config=tiny.lora_config(2))
        return str(caught.value)

    assert "Expected eval_dataset to have rows, found none: pass some" in told(Dataset.from_list([PAIR]).select([]))
    assert "Expected mine to be a datasets.Dataset, found none: pass one." in told({"mine": None})


def test_a_null_in_a_row_that_is_not_chosen_does_not_matter():
    rows = Dataset.from_list([PAIR, PAIR | {"prompt": None}, {"prompt": "x", "completion": None}])
    assert [*text_problems("rows", rows.select([0]), ["prompt", "completion"])] == []
    assert len([*text_problems("rows", rows, ["prompt", "completion"])]) == 2
    talk = Dataset.from_list([{"messages": [{"role": "user", "content": None}]}])
    assert [*text_problems("rows", talk, ["messages"])] == []


def test_a_script_ends_with_the_sentence_alone(tmp_path):
    """And still with a traceback where a library says what no one foresaw."""
    (tmp_path / "rows.json").write_text("[{]")
    recipe = RecipeArguments(dataset=str(tmp_path / "rows.json"), num_clients=2)
    args = FederatedSketchConfig(output_dir=str(tmp_path / "run"), use_cpu=True, bf16=False)
    with (
        pytest.raises(SystemExit, match="^Expected .*rows.json to hold rows as json") as caught,
        claimed(args.output_dir),
    ):
        build_trainer(recipe, args, ModelArguments(model_name_or_path="m"))
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="unforeseen"), claimed(args.output_dir):
        raise ValueError("Expected something else, unforeseen")


def test_a_model_that_is_nowhere_is_told_in_a_line(tmp_path):
    args = FederatedSketchConfig(output_dir=str(tmp_path / "run"), use_cpu=True, bf16=False)
    told = "found 'models/mispelt' .*: correct it, or log in if it asks"
    with pytest.raises(SystemExit, match=told) as caught, claimed(args.output_dir):
        build_trainer(RecipeArguments(num_clients=2), args, ModelArguments(model_name_or_path="models/mispelt"))
    assert len(str(caught.value).splitlines()) == 2 and not (tmp_path / "run").exists()


# ---- The Hub ----


@pytest.mark.parametrize(
    "answer", [None, [], "user", {}, {"name": None}, {"name": 5}, {"name": ""}, {"error": "x" * 10**6}]
)
def test_an_answer_that_says_no_name(answer):
    with pytest.raises(HubError, match=r"^Expected the Hub to say whom the token belongs to, found .*\.$") as caught:
        Owner.of(answer)
    assert len(str(caught.value)) < 400 and caught.value.kind == "server"


@pytest.mark.parametrize(
    ("more", "organizations", "reads_only"),
    [
        ({}, (), False),
        ({"orgs": None, "auth": None}, (), False),
        ({"orgs": 5, "auth": []}, (), False),
        ({"orgs": [None, {}, {"name": 7}, {"name": "team"}], "auth": {"accessToken": None}}, ("team",), False),
        ({"auth": {"accessToken": {"role": ["read"]}}}, (), False),
        ({"auth": {"accessToken": {"role": "read"}}}, (), True),
    ],
)
def test_what_is_missing_in_an_answer_is_not_needed(more, organizations, reads_only):
    assert Owner.of({"name": "user"} | more) == Owner("user", organizations, reads_only)
