"""Comparisons at equal bytes, with compressed updates, and with every method."""

from pathlib import Path

import pytest

from fslora_hf.common.settings import SettingsError
from fslora_hf.comparison.arguments import parse_comparison
from fslora_hf.comparison.runs import runs_of
from fslora_hf.methods import METHODS
from tests.comparison.test_compare import LATER, ROOT
from tests.support import compared


@pytest.mark.parametrize("name", LATER)
def test_every_comparison_is_read(name):
    compared.check_comparison(ROOT / "recipes/comparisons" / f"{name}.yaml")


def test_the_comparison_of_methods_has_all_of_them():
    comparison = parse_comparison(["--config", str(ROOT / "recipes/comparisons/methods.yaml")])
    assert set(comparison.methods) == set(METHODS)


def test_equal_bytes_end_each_run(tmp_path: Path):
    args = compared.write_comparison(tmp_path, rounds=None, upload_megabytes=2.5, settings={"num_rounds": 50})
    _, runs = runs_of(parse_comparison(args))
    assert {(run.args.upload_budget, run.args.num_rounds) for run in runs} == {(2.5, 50)}


def test_equal_bytes_need_a_rate_that_does_not_fall_with_rounds(tmp_path: Path):
    changes = {"rounds": None, "upload_megabytes": 2.5, "settings": {"lr_scheduler_type": "linear"}}
    with pytest.raises(SettingsError) as caught:
        runs_of(parse_comparison(compared.write_comparison(tmp_path, **changes)))
    (text,) = caught.value.problems
    assert "Expected lr_scheduler_type to be constant or constant_with_warmup at equal bytes, found 'linear'" in text
