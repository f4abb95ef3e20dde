"""Seeded damage to what people write: recipes and files of rows. Each ends in the right result or in one sentence."""

import dataclasses
import json
import math
import os
import random
import traceback
from pathlib import Path

import pytest
import yaml
from datasets import Dataset

from fslora_hf.common.settings import SettingsError
from fslora_hf.config.federation import FederatedSketchConfig
from fslora_hf.config.recipe import ModelArguments, RecipeArguments, parse_recipe
from fslora_hf.data.commonsense import load_commonsense
from fslora_hf.data.sources import load_rows
from fslora_hf.data.templates import published_row
from fslora_hf.trainers.checks import check_columns
from tests.support.damage import ODD_VALUES, variants

TYPES = (RecipeArguments, FederatedSketchConfig, ModelArguments)
TOKEN = "hf_" + "QwErTy0123456789" * 2
PASSWORD = "correct-horse-battery"
RECIPE = {
    "model_name_or_path": "some/model",
    "num_clients": 4,
    "use_cpu": True,
    "bf16": False,
    "num_rounds": 7,
    "learning_rate": 0.003,
    "client_ranks": [1, 2, 3, 4],
    "lora_target_modules": ["q_proj", "v_proj"],
    "lr_scheduler_type": "constant",
    "model_init_kwargs": {"token": PASSWORD, "dtype": "float32"},
    "hub_token": TOKEN,
    "output_dir": "runs/one",
    "env": {"FSLORA_FUZZ": PASSWORD},
}
FIELDS = [each.name for kind in TYPES for each in dataclasses.fields(kind)]
# Python's and YAML's odd values, and what breaks parsers of YAML alone.
YAML_VALUES = [value for value in ODD_VALUES if "\\ud800" not in value] + [
    "[" * 5000,
    "{a: " * 5000,
    "- " * 3000 + "x",
    "!!python/object/apply:os.system [ls]",
    "!!int x",
    "!!bool maybe",
    "!!timestamp x",
    "!!float [1]",
    "2020-13-45",
    "*nothing",
    "&a [*a]",
    "&a {b: *a}",
    "{? [1, 2] : 3}",
    "{a: 1, a: 2}",
    "!!binary '?'",
    "!!set {a, b}",
    "@x",
    "%x",
    "'open",
    "|\n  text\n and",
    "a: b: c",
    "0o9",
    "1:99:99",
    ".inf",
    "-.inf",
    ".nan",
    "2020-01-01",
    "~",
]


@pytest.fixture(autouse=True)
def environment_kept():
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


def read(path: Path) -> tuple | str:
    """The settings of a recipe, or all that a user sees of the error."""
    try:
        return parse_recipe(TYPES, ["--config", str(path)])
    except SettingsError as error:
        assert all(text.startswith("Expected ") and "\n" not in text and len(text) < 2000 for text in error.problems)
        return "".join(traceback.format_exception(error))


def check(result: tuple | str, moved: bool = False) -> None:
    """No secret of a refused recipe is shown; a recipe that is read holds numbers that work."""
    if isinstance(result, str):
        assert TOKEN not in result and len(result) < 30_000
        assert moved or PASSWORD not in result  # which nothing tells once it stands elsewhere
        return
    for part in result:
        for each in dataclasses.fields(part):
            value = getattr(part, each.name)
            assert not isinstance(value, float) or math.isfinite(value)
    json.dumps(result[1].to_dict(), default=str, allow_nan=False)


@pytest.mark.parametrize("seed", range(4))
def test_damaged_recipes(tmp_path, seed):
    path = tmp_path / "recipe.yaml"
    content = json.dumps(RECIPE).encode() if seed % 2 else yaml.safe_dump(RECIPE).encode()
    made = 0
    for damage in variants("recipe.json" if seed % 2 else "recipe.safe", content, seed, 110 if seed % 2 else 0):
        path.write_bytes(damage.content)
        made += 1
        check(read(path), moved="swapped" in damage.how)
    draw = random.Random(seed)
    for _ in range(0 if seed % 2 else 110):  # bytes of a plain file, which JSON's kinds of damage cannot take apart
        changed = bytearray(content)
        for _ in range(draw.randint(1, 4)):
            place = draw.randrange(len(changed))
            changed[place : place + draw.randint(0, 3)] = draw.choice(
                [b"\n", b":", b" ", b"'", b"\t", b"", b"- ", b"&a *a"]
            )
        path.write_bytes(bytes(changed))
        made += 1
        check(read(path))
    assert made == 110


@pytest.mark.parametrize("seed", range(3))
def test_odd_values_of_every_setting(tmp_path, seed):
    path, draw = tmp_path / "recipe.yaml", random.Random(seed)
    base = {name: RECIPE[name] for name in ("model_name_or_path", "num_clients", "use_cpu", "bf16")}
    sound = parse_recipe(TYPES, [word for name, value in base.items() for word in (f"--{name}", str(value))])
    for number in range(120):
        name = FIELDS[(number * 3 + seed) % len(FIELDS)]
        told = draw.choice(YAML_VALUES)
        path.write_text(
            "".join(f"{key}: {value}\n" for key, value in base.items() if key != name) + f"{name}: {told}\n"
        )
        result = read(path)
        check(result)
        if not isinstance(result, str):  # all others are what they were
            for part, whole in zip(result, sound, strict=True):
                for each in dataclasses.fields(part):
                    if each.name not in (name, *_FOLLOWING.get(name, ())):
                        assert repr(getattr(part, each.name)) == repr(getattr(whole, each.name)), (
                            name,
                            told,
                            each.name,
                        )


# Settings that the classes above set by others.
_FOLLOWING = {
    "activation_checkpointing": ["gradient_checkpointing"],
    "gradient_checkpointing": ["activation_checkpointing"],
    "activation_checkpointing_kwargs": ["gradient_checkpointing_kwargs"],
    "gradient_checkpointing_kwargs": ["activation_checkpointing_kwargs"],
    "torch_compile_backend": ["torch_compile"],
    "torch_compile_mode": ["torch_compile", "torch_compile_backend"],
    "data_dir": ["dataset"],
    "metric_for_best_model": ["greater_is_better"],
}


def published(count: int) -> list[dict]:
    return [published_row("boolq", f"is {i} even", ("true", "false"), i % 2) for i in range(count)]


def lines(rows: list[dict]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def told(call) -> Dataset | str:
    try:
        return call()
    except (ValueError, OSError) as error:
        text = str(error)
        assert text.startswith("Expected ") and text.isprintable() and len(text) < 1500, text[:300]
        return text


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("mine.json", published(3)),
        ("mine.jsonl", published(3)),
        ("mine.json", [{"prompt": f"p{i}", "completion": f" c{i}"} for i in range(3)]),
        ("mine.jsonl", [{"prompt": f"p{i}", "completion": f" c{i}"} for i in range(3)]),
    ],
)
def test_damaged_files_of_rows(tmp_path, name, rows):
    args = FederatedSketchConfig(output_dir="x", use_cpu=True, bf16=False)
    content = json.dumps(rows).encode() if name.endswith(".json") else lines(rows)
    for number, damage in enumerate(variants(name, content, 5, 30)):
        path = tmp_path / str(number) / name
        path.parent.mkdir()
        path.write_bytes(damage.content)
        found = told(lambda path=path: load_rows(str(path), "train"))
        if isinstance(found, str) or list(check_columns(args, found, None)):
            continue
        wanted = parsed(damage.content)
        assert found["prompt"][:] and all(isinstance(text, str) for text in [*found["prompt"], *found["completion"]])
        if wanted is not None and "prompt" in rows[0]:
            assert [(row["prompt"], row["completion"]) for row in found] == wanted, damage.how


def parsed(content: bytes) -> list | None:
    """The rows as Python's reader sees them, None for what it does not take."""
    try:
        text = content.decode("utf-8-sig")
        rows = json.loads(text) if text.lstrip().startswith("[") else [json.loads(line) for line in text.splitlines()]
        return [(row["prompt"], row["completion"]) for row in rows]
    except (ValueError, TypeError, KeyError, RecursionError):
        return None


def test_damaged_files_of_the_published_layout(tmp_path):
    content = json.dumps(published(3)).encode()
    path = tmp_path / "boolq" / "train.json"
    path.parent.mkdir()
    for damage in variants(path.name, content, 3, 150):
        path.write_bytes(damage.content)
        found = told(lambda: load_commonsense(tmp_path))
        if not isinstance(found, str):
            assert len(found) and all(isinstance(text, str) for text in found["prompt"])
