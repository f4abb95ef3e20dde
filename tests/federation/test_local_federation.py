"""recipes/federation/local.py, which `make federation` runs: where its run goes."""

import argparse

import local  # recipes/federation/local.py
import pytest


def options(recipe, *overrides, resume=False):
    return argparse.Namespace(recipe=str(recipe), overrides=list(overrides), resume=resume)


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "recipe.yaml"
    path.write_text("output_dir: outputs/here\nnum_rounds: 1\n")
    return path


def test_a_second_run_takes_a_folder_of_its_own(recipe, tmp_path):
    assert local.where(options(recipe)) == ["--output_dir", "outputs/here"]
    (tmp_path / "outputs/here").mkdir(parents=True)
    assert local.where(options(recipe)) == ["--output_dir", "outputs/here"]  # empty: nothing to lose
    (tmp_path / "outputs/here/rounds.jsonl").touch()
    assert local.where(options(recipe)) == ["--output_dir", "outputs/here-2"]
    (tmp_path / "outputs/here-2").touch()  # a file is no place, either
    assert local.where(options(recipe)) == ["--output_dir", "outputs/here-3"]


def test_a_folder_that_is_named_or_resumed_is_taken_as_it_is(recipe, tmp_path):
    (tmp_path / "outputs/here").mkdir(parents=True)
    (tmp_path / "outputs/here/rounds.jsonl").touch()
    assert local.where(options(recipe, resume=True)) == []
    assert local.where(options(recipe, "--output_dir", "elsewhere")) == []
    assert local.where(options(recipe, "--output_dir=elsewhere")) == []


@pytest.mark.parametrize("text", ["", "- a list", "num_rounds: 1", "output_dir: 3", "a: [", "\x00", "[" * 5000])
def test_what_is_wrong_with_a_recipe_is_left_to_the_run_to_tell(recipe, text):
    recipe.write_text(text)
    assert local.where(options(recipe)) == []


def test_without_a_recipe_file_the_run_tells(tmp_path):
    assert local.where(options(tmp_path / "none.yaml")) == []
