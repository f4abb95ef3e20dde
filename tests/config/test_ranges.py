"""Settings that passed the checks and failed later: every number, and the folder, told before a model is loaded."""

import dataclasses
import errno
import math
import os
import re
import typing
from pathlib import Path

import pytest

from fslora_hf import FederatedSketchTrainer
from fslora_hf.common.settings import SettingsError, is_a
from fslora_hf.comparison.arguments import ComparisonArguments
from fslora_hf.config.federation import FederatedSketchConfig
from fslora_hf.config.ranges import range_of
from fslora_hf.config.recipe import ModelArguments, RecipeArguments
from fslora_hf.config.refusals import REFUSED
from fslora_hf.federation.server import FederationArguments
from fslora_hf.storage.disk_errors import WriteError
from fslora_hf.storage.folders import check_writable
from tests.support import tiny

WORKING = {
    FederatedSketchConfig: {"output_dir": "unused", "use_cpu": True, "bf16": False},
    RecipeArguments: {"num_clients": 2},
    ModelArguments: {"model_name_or_path": "m"},
    ComparisonArguments: {"recipe": "r"},
    FederationArguments: {"recipe": "r"},
}
# What no number is wrong for, or of which others say what works.
FREE = {
    "local_rank": "set by the launcher",
    "save_total_limit": "none above 0 keeps all",
    "dirichlet_alpha": "has words of its own",
    "lora_dropout": "has words of its own",
    "upload_top_k": "has words of its own",
    "max_update_norm": "infinity is no bound",
    "max_norm_ratio": "0 is no bound",
}


def numbers():
    """(dataclass, field) of every setting that may be a number."""
    for kind in WORKING:
        hints = typing.get_type_hints(kind)
        for each in dataclasses.fields(kind):
            union = typing.get_args(hints[each.name]) or (hints[each.name],)
            if {int, float} & {*union} and each.name not in REFUSED:
                yield pytest.param(kind, each.name, id=each.name)


def problems_of(kind, **settings) -> list[str]:
    with pytest.raises(SettingsError) as caught:
        kind(**WORKING[kind] | settings)
    return [text for text in caught.value.problems if not text.startswith("Expected one budget")]


@pytest.mark.parametrize(("kind", "name"), numbers())
def test_every_number_has_a_least_and_a_greatest_value(kind, name):
    if name in FREE:
        return
    known, besides = (
        range_of(kind.__dataclass_fields__[name]),
        {"partition": "sorted_shards"} if name == "shards_per_client" else {},
    )
    assert math.isfinite(known.greatest)
    for value in (math.nan, math.inf, -math.inf, -1, -(10**400), 10**400, 1e300, True, "x", [1], {"a": 1}):
        if name == "pad_to_multiple_of" and value == "x":
            continue  # transformers' own sentence
        if name == "max_grad_norm" and value == math.inf:
            continue  # no clipping
        [text] = problems_of(kind, **besides, **{name: value})
        assert text.startswith(f"Expected {name} to be ") and len(text) < 400
        assert ("found" in text) and re.search(r": (raise it|lower it|write [\w ,]+|give [\w ]+)\.$", text), text


@pytest.mark.parametrize(("kind", "name"), numbers())
def test_bounds_themselves_work(kind, name):
    if name in FREE or kind in (ComparisonArguments, FederationArguments):
        return
    known, whole = range_of(kind.__dataclass_fields__[name]), not is_a(kind.__dataclass_fields__[name].default, float)
    besides = {
        "dataloader_prefetch_factor": {"dataloader_num_workers": 1},
        "min_rank": {"max_rank": 2**16, "rank_distribution": "uniform"},
        "shards_per_client": {"partition": "sorted_shards"},
    }
    for value in {known.least, known.greatest}:
        inside = (
            value if not (known.above and value == known.least or known.below and value == known.greatest) else 0.5
        )
        size = {"local_steps": 1, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 1} | {name: inside}
        size = size if kind is FederatedSketchConfig else {name: inside}
        made = kind(**WORKING[kind] | size | besides.get(name, {}))
        assert getattr(made, name) == inside or whole


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"learning_rate": math.inf}, "learning_rate to be at most 1000000, found inf: lower it."),
        ({"learning_rate": float("1e400")}, "learning_rate to be at most 1000000, found inf: lower it."),
        ({"adam_beta1": 1}, "adam_beta1 to be below 1, found 1: lower it."),
        ({"adam_epsilon": -1}, "adam_epsilon to be at least 1e-30, found -1: raise it."),
        ({"adam_epsilon": 0}, "adam_epsilon to be at least 1e-30, found 0: raise it."),
        ({"dataloader_num_workers": -1}, "dataloader_num_workers to be at least 0, found -1: raise it."),
        ({"seed": 2**32}, "seed to be at most 4294967295, found 4294967296: lower it."),
        ({"data_seed": 2**32}, "data_seed to be at most 4294967295, found 4294967296: lower it."),
        ({"hub_deadline": 1e10}, "hub_deadline to be at most 1000000000, found 10000000000.0: lower it."),
        (
            {"local_steps": 10**6, "per_device_train_batch_size": 10**3},
            "local_steps, per_device_train_batch_size, gradient_accumulation_steps to be of at most 100000000 "
            "examples together, a client's in a round, found 1000000000: lower one of them.",
        ),
        (
            {"lr_scheduler_kwargs": {"a": [math.nan]}},
            "lr_scheduler_kwargs to be a mapping of finite numbers and texts, no deeper than needed, found "
            "{'a': [nan]}: correct its values.",
        ),
        (
            {"report_to": {"a": 1}},
            "report_to to be a text or a list of texts, found {'a': 1}: write a text or a list of texts.",
        ),
        (
            {"label_names": "labels"},
            "label_names to be a list of texts, found 'labels': put it in brackets, with commas between several.",
        ),
        (
            {"model_init_kwargs": [1]},
            "model_init_kwargs to be a mapping or a text, found [1]: write a mapping or a text.",
        ),
    ],
)
def test_what_passed_the_checks_and_failed_later(settings, text):
    assert problems_of(FederatedSketchConfig, **settings) == [f"Expected {text}"]


@pytest.mark.parametrize(
    ("settings", "start", "end"),
    [
        ({"lr_scheduler_kwargs": {"foo": 1}}, "lr_scheduler_type=linear takes", "correct lr_scheduler_kwargs."),
        ({"lr_scheduler_type": "warmup_stable_decay"}, "lr_scheduler_type=warmup_", "correct lr_scheduler_kwargs."),
        ({"optim_args": "momentum"}, "optim=adamw_torch_fused takes", "correct optim_args."),
        ({"optim": "ademamix", "optim_args": "beta1=x"}, "optim=ademamix takes", "correct optim_args."),
    ],
)
def test_optimizer_and_schedule_are_tried(settings, start, end):
    [text] = problems_of(FederatedSketchConfig, **settings)
    assert text.startswith(f"Expected settings that {start}") and text.endswith(end) and len(text) < 400


@pytest.mark.parametrize("strategy", ["no", "epoch"])
def test_logs_that_no_step_asks_for_may_come_every_0_steps(strategy):
    settings = WORKING[FederatedSketchConfig] | {"logging_strategy": strategy}
    assert FederatedSketchConfig(**settings, logging_steps=0).logging_steps == 0


def test_other_words_for_not_at_all():
    config = FederatedSketchConfig(**WORKING[FederatedSketchConfig], max_grad_norm=math.inf, dataset_num_proc=0)
    assert (config.max_grad_norm, config.dataset_num_proc) == (0.0, 0)


def test_such_problems_are_told_together():
    found = problems_of(
        FederatedSketchConfig, learning_rate=math.inf, adam_beta1=1, seed=-1, optim_args="a", output_dir=""
    )
    assert len(found) == 5


def test_a_global_rank_that_no_layer_has():
    assert problems_of(ModelArguments, lora_r=10**9, lora_alpha=10**19) == [
        "Expected lora_r to be at most 65536, found 1000000000: lower it.",
        "Expected lora_alpha to be at most 65536, found 10000000000000000000: lower it.",
    ]


@pytest.mark.parametrize("name", ["", "  ", "a\0b", "a" * 256, "ä" * 128, "a/" * 2000, "\ud800"])
@pytest.mark.parametrize("kind", [FederatedSketchConfig, ComparisonArguments])
def test_a_name_that_no_folder_can_have(kind, name):
    [text] = problems_of(kind, output_dir=name)
    assert text.startswith("Expected output_dir to be ") and len(text) < 500 and "\0" not in text


class Loaded(Exception):
    """A model would have been loaded."""


def train_in(folder: Path) -> None:
    args = FederatedSketchConfig(output_dir=str(folder), use_cpu=True, bf16=False, num_rounds=1)
    FederatedSketchTrainer("no/model", args, train_dataset=tiny.tokenised(), peft_config=tiny.lora_config(4))


@pytest.fixture
def nothing_loads(monkeypatch):
    def refuse(*args, **kwargs):
        raise Loaded

    monkeypatch.setattr("trl.trainer.sft_trainer.SFTTrainer.__init__", refuse)


@pytest.mark.parametrize("folder", ["file", "file/run", "file/a/b"])
def test_a_file_where_a_folder_should_be(tmp_path, nothing_loads, folder):
    (tmp_path / "file").write_text("kept")
    with pytest.raises(
        WriteError, match=f"^Expected to write {tmp_path / folder}, found 'Not a directory': name another"
    ):
        train_in(tmp_path / folder)
    assert (tmp_path / "file").read_text() == "kept" and len([*tmp_path.iterdir()]) == 1


def test_a_disk_that_is_read_only(tmp_path, nothing_loads, monkeypatch):
    """As mkdir answers there, root or not."""

    def refuse(path, *args, **kwargs):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), path)

    (tmp_path / "run").mkdir()
    monkeypatch.setattr(os, "mkdir", refuse)
    for folder in (tmp_path / "run", tmp_path / "run" / "new"):
        with pytest.raises(WriteError, match="found 'Read-only file system': let it be written to, and start again"):
            train_in(folder)


def test_a_folder_that_can_be_written_to_is_left_as_it_is(tmp_path, nothing_loads):
    check_writable(tmp_path / "a" / "b")
    assert [*tmp_path.iterdir()] == []
    with pytest.raises(Loaded):
        train_in(tmp_path / "a" / "b")
