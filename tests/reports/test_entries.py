import json
import math

import pytest

from fslora_hf.data import load_miniature
from fslora_hf.evaluation.outcomes import Outcome, question_id, summarise
from fslora_hf.evaluation.results import Subject, make_results, write_results
from fslora_hf.models.description import ModelSource
from fslora_hf.reports.entries import read_results
from fslora_hf.reports.leaderboard import rank
from tests.support.result_files import OTHER, REFERENCE, evaluation


def test_folders_are_searched_and_a_file_counts_once(tmp_path):
    first = evaluation(tmp_path, "first", REFERENCE)
    deep = evaluation(tmp_path / "deep", "deep", OTHER, name="the deep one", seed=3)
    (tmp_path / "notes.json").write_text("{}")
    entries = read_results([first, tmp_path, str(tmp_path / "deep" / ".." / "first.results.json")])
    assert [entry.source for entry in entries] == [first.as_posix(), deep.as_posix()]
    deep_entry = entries[1]
    assert (deep_entry.name, deep_entry.seed, deep_entry.model["name"]) == ("the deep one", 3, "tiny")
    assert set(deep_entry.scores) == {"accuracy", "accuracy_norm", "format_validity"}
    assert set(deep_entry.scores["accuracy"]) == {"a", "b"}  # the file's average is left out
    assert deep_entry.answers["b"].right["accuracy"] == (True, True)


def test_an_evaluation_of_the_project_is_read(tmp_path):
    """What the evaluation writes is what is read here."""
    rows = load_miniature(split="test", rows_per_task=12)
    outcomes = []
    for i, row in enumerate(rows):
        choice = None if i == 3 else row["answer"] if i % 3 else "something else"
        options = (row["answer"], "something else")
        likelihoods = (math.nan if i == 3 else -1.0, -2.0)
        outcomes.append(
            Outcome(question_id(row), row["task"], row["answer"], options, choice, likelihoods, row["answer"])
        )

    class LogLikelihood:
        name, settings = "loglikelihood", {}

    scores = summarise("loglikelihood", outcomes)
    subject = Subject("a model", ModelSource("tiny", "0123456789abcdef"))
    results = make_results(subject, LogLikelihood, rows, scores, seed=0, seconds=1.0, processes=1, batch_size=4)
    write_results(tmp_path, "base.loglikelihood", results, scores)
    (entry,) = read_results([tmp_path])
    right = sum(outcome.correct for outcome in outcomes)
    assert sum(sum(answers.right["accuracy"]) for answers in entry.answers.values()) == right
    board = rank([entry], "format_validity")
    assert board.rows[0].average.value == pytest.approx(scores.metrics["accuracy"]["format_validity"])
    assert rank([entry]).rows[0].average.value == pytest.approx(scores.metrics["accuracy"]["accuracy"])


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"format": 2}, "Expected format in .*x.results.json to be 1, found 2: read it with"),
        ({"protocol": "generat"}, "Expected protocol in .* one of loglikelihood, generate, .*did you mean generate"),
        ({"name": 3}, "Expected name in .* to be a text, found 3"),
        ({"adapter": "x"}, "Expected adapter in .* to be an object or null, found 'x'"),
        ({"seed": True}, "Expected seed in .* to be an integer, found True"),
        ({"outcomes": "../y.jsonl"}, "Expected outcomes in .* the name of a file beside it, found '../y.jsonl'"),
        ({"outcomes": ""}, "Expected outcomes in .* the name of a file beside it, found ''"),
        ({"scores": []}, "Expected scores in .* to be the scores of one task or more, found \\[\\]"),
        ({"scores": [3]}, r"Expected scores\[0\] in .* to be an object, found 3"),
        ({"scores": {}}, "Expected scores in .* to be a list"),
    ],
)
def test_a_damaged_results_file_is_an_error(tmp_path, changes, sentence):
    evaluation(tmp_path, "x", REFERENCE, **changes)
    with pytest.raises(ValueError, match=sentence):
        read_results([tmp_path])


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("value", 1.2, r"Expected scores\[1\].value in .* a share between 0 and 1, found 1.2"),
        ("value", math.nan, r"Expected scores\[1\].value in .* found nan"),
        ("standard_error", -0.1, r"Expected scores\[1\].standard_error in .* found -0.1"),
        ("rows", 0, r"Expected scores\[1\].rows in .* at least 1, found 0"),
        ("metric", "acuracy", r"Expected scores\[1\].metric in .* did you mean accuracy"),
        ("metric", "accuracy", r"Expected scores\[1\] in .* of a task and metric of its own"),
        ("task", None, r"Expected scores\[1\].task in .* a text, found None"),
    ],
)
def test_a_damaged_score_is_an_error(tmp_path, key, value, sentence):
    path = evaluation(tmp_path, "x", REFERENCE)
    results = json.loads(path.read_text())
    results["scores"][1][key] = value
    path.write_text(json.dumps(results))
    with pytest.raises(ValueError, match=sentence):
        read_results([path])


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b'{"format": 1, ', "Expected JSON in .*x.results.json, found .*: give the file as the evaluation wrote it"),
        (b"[" * 100_000, "Expected JSON in .*x.results.json"),
        (b"\xff\xfe", "Expected UTF-8 text in .*x.results.json, found byte 0"),
        (b'{"results": {}}', 'a results file with "format" and "scores", found {\'results\': {}}'),
        (b"17", 'a results file with "format" and "scores", found 17'),
        (b'{"format": 1, "scores": []}', "Expected name in .*, found only format, scores"),
    ],
)
def test_a_file_of_something_else_is_an_error(tmp_path, content, sentence):
    path = tmp_path / "x.results.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=sentence):
        read_results([path])


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ('"correct": false, "choice_norm": "no"}', '"corr', "Expected JSON in line 3 of x.outcomes.jsonl of .*x.res"),
        ('"choice_norm"', '"norm"', "Expected line 1.choice_norm in x.outcomes.jsonl of .*, found only question"),
        ('"correct": true', '"correct": "yes"', "Expected line 1.correct in .* true or false, found 'yes'"),
        ('"correct": true', '"correct": false', "accuracy 0.5 on 4 questions of a, found 0 right of 4: keep"),
        ('"task": "b"', '"task": "c"', "accuracy 0.5 on 2 questions of b, found 0 right of 0"),
    ],
)
def test_damaged_outcomes_are_an_error(tmp_path, old, new, sentence):
    path = evaluation(tmp_path, "x", REFERENCE)
    file = tmp_path / "x.outcomes.jsonl"
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))
    with pytest.raises(ValueError, match=sentence):
        read_results([path])


def test_other_line_separators_within_a_text_do_not_end_a_line(tmp_path):
    path = evaluation(tmp_path, "x", {"a": "10"}, ids={"a": ["one\u2028two", "three\x85four"]})
    assert read_results([path])[0].answers["a"].questions == ("one\u2028two", "three\x85four")


def test_a_path_without_results_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="Expected results files .* at .*nowhere, found nothing: name"):
        read_results([tmp_path / "nowhere"])
    with pytest.raises(FileNotFoundError, match="found a folder without one"):
        read_results([tmp_path])
