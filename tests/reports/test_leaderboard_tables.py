"""A leaderboard as text, Markdown and CSV, and the script that writes them."""

import csv
import io
import math
import sys

import pytest

from fslora_hf.reports.entries import read_results
from fslora_hf.reports.leaderboard import interval, rank
from fslora_hf.reports.leaderboard_tables import CSV_START, MARK, to_csv, to_markdown, to_text
from recipes import leaderboard as recipe
from tests.support.result_files import OTHER, REFERENCE, adapter, evaluation


@pytest.fixture
def written(tmp_path):
    evaluation(tmp_path, "reference", REFERENCE)
    evaluation(tmp_path, "other", OTHER, name="=1+1|<b>*", adapter=adapter(7), with_outcomes=False)
    evaluation(tmp_path, "third", {"a": "0000", "b": "01"}, name="third")
    return rank(read_results([tmp_path]), reference="reference")


def test_text_table(written):
    lines = to_text(written).splitlines()
    assert lines[0] == f"{MARK}: accuracy"
    header, rule, *rows = lines[2:8]
    assert header.split() == "# name protocol average [95 %] difference a b questions".split()
    assert set(rule) == {"-"}
    assert rows[0].split() == ("1 =1+1|<b>* [1] loglikelihood 62.5 [41.3, 83.7] - 25.0 ± 21.7 100.0 ± 0.0 6".split())
    assert rows[1].split()[:8] == "2 reference loglikelihood 50.0 [7.6, 92.4] reference 50.0".split()
    # On a: -1, -1, 0, 0 has mean -1/2, sd sqrt(1/3); on b: -1, 1 has mean 0, sd sqrt(2).
    error = 100 * math.sqrt(1 / 12 + 1) / 2
    assert f" -25.0 ± {error:.1f} " in rows[2]
    assert lines[8].split() == "majority rate 50.0 50.0 50.0".split()
    assert lines[-1] == "[1] No outcomes file beside the results: no paired differences with it."


def test_markdown_keeps_names_text(written):
    lines = to_markdown(written).splitlines()
    assert lines[0] == f"<!-- {MARK} -->"
    table = [line for line in lines if line.startswith("|")]
    assert "| 1 | =1+1\\|&lt;b&gt;\\*<sup>" in table[2].replace(" <sup>", "<sup>")
    cells = {line.replace("\\|", "").count("|") for line in table}
    assert cells == {9}


def test_csv_holds_the_numbers_and_no_formula(written):
    rows = list(csv.DictReader(io.StringIO(to_csv(written))))
    assert tuple(rows[0])[: len(CSV_START)] == CSV_START
    assert [row["name"] for row in rows] == ["'=1+1|<b>*", "reference", "third"]
    for row, expected in zip(rows, written.rows, strict=True):
        assert float(row["average"]) == expected.average.value
        assert float(row["average_low"]) == interval(expected.average)[0]
        assert float(row["b_standard_error"]) == expected.scores["b"].standard_error
        assert row["source"] == expected.entry.source
    assert [row["difference"] for row in rows] == ["", "", "-0.25"]
    assert [row["difference_excludes_zero"] for row in rows] == ["", "", "False"]
    assert [row["round"] for row in rows] == ["7", "", ""]


def test_format_validity_has_no_majority_rate(tmp_path):
    evaluation(tmp_path, "x", REFERENCE)
    text = to_text(rank(read_results([tmp_path]), "format_validity"))
    assert "ajority" not in text
    assert "Difference" not in text  # of one entry


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["leaderboard.py", *map(str, arguments)])
    recipe.main()


def test_the_script_prints_and_writes(tmp_path, monkeypatch, capsys):
    results, out = tmp_path / "results", tmp_path / "out"
    evaluation(results, "reference", REFERENCE)
    evaluation(results, "other", OTHER)
    run(monkeypatch, results, "--reference", "reference", "--output_dir", out)
    printed = capsys.readouterr().out
    text = (out / "leaderboard.txt").read_text()
    assert text in printed
    assert "+12.5 ± 28.0" in text
    assert {path.name for path in out.iterdir()} == {f"leaderboard.{end}" for end in ("txt", "md", "csv", "html")}
    assert list(csv.DictReader(io.StringIO((out / "leaderboard.csv").read_text())))[0]["name"] == "other"
    # Its own files are replaced, by other ones.
    run(monkeypatch, results, "--metric", "format_validity", "--output_dir", out)
    assert "format validity" in (out / "leaderboard.html").read_text()


@pytest.mark.parametrize("name", ["leaderboard.txt", "leaderboard.md", "leaderboard.csv", "leaderboard.html"])
def test_the_script_replaces_nothing_of_others(tmp_path, monkeypatch, name):
    evaluation(tmp_path / "results", "x", REFERENCE)
    out = tmp_path / "out"
    out.mkdir()
    (out / name).write_text("rank,name\n1,me\n")
    with pytest.raises(SystemExit, match=f"Expected .*{name} to be a leaderboard .*, found something else: move"):
        run(monkeypatch, tmp_path / "results", "--output_dir", out)
    assert [path.name for path in out.iterdir()] == [name]
    assert (out / name).read_text() == "rank,name\n1,me\n"


def test_the_script_ends_with_a_sentence(tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match="Expected results files"):
        run(monkeypatch, tmp_path / "nowhere")
    evaluation(tmp_path, "one", REFERENCE)
    evaluation(tmp_path, "two", OTHER, prompt_hash="f" * 16)
    with pytest.raises(SystemExit, match="--allow_other_prompts"):
        run(monkeypatch, tmp_path)
    run(monkeypatch, tmp_path, "--allow_other_prompts")
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match="file"):
        run(monkeypatch, tmp_path, "--allow_other_prompts", "--output_dir", tmp_path / "file")
