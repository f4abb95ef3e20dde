import math
import random

import numpy as np
import pytest

from fslora_hf.reports.entries import Entry, read_results
from fslora_hf.reports.leaderboard import excludes_zero, interval, rank, unique_names
from fslora_hf.reports.leaderboard_tables import to_text
from tests.support.result_files import OTHER, REFERENCE, adapter, evaluation


def by_name(board):
    return {row.name: row for row in board.rows}


@pytest.fixture
def two(tmp_path):
    evaluation(tmp_path, "reference", REFERENCE)
    evaluation(tmp_path, "other", OTHER)
    return read_results([tmp_path])


def test_averages_and_differences_by_hand(two):
    rows = by_name(rank(two, reference="reference"))
    assert [rows["other"].rank, rows["reference"].rank] == [1, 2]
    assert rows["reference"].average.value == 0.5
    assert rows["other"].average.value == 0.625  # of 1/4 and 2/2
    # sqrt(0.25/4 + 0.25/2) / 2
    assert rows["reference"].average.standard_error == pytest.approx(0.21650635)
    assert interval(rows["reference"].average) == pytest.approx((0.07564755, 0.92435245))
    # On a: 0, -1, 0, 0 has mean -1/4 and sd 1/2; on b: 0, 1 has mean 1/2 and sd sqrt(1/2).
    assert rows["other"].paired["a"].value == -0.25
    assert rows["other"].paired["a"].standard_error == pytest.approx(0.25)
    assert rows["other"].paired["b"].standard_error == pytest.approx(0.5)
    assert rows["other"].difference.value == 0.125
    assert rows["other"].difference.standard_error == pytest.approx(math.sqrt(0.0625 + 0.25) / 2)
    assert rows["reference"].difference is None and rows["reference"].is_reference
    assert rows["other"].questions(["a", "b"]) == 6


def test_the_first_ranked_is_the_reference_unless_one_is_named(two):
    assert rank(two).reference.name == "other"
    assert rank(two).rows[1].difference.value == -0.125
    for meant in ("reference", two[1].source, "reference.results.json"):
        assert rank(two, reference=meant).reference.name == "reference"


def test_a_reference_that_is_none_or_several_is_an_error(tmp_path):
    for number in (1, 2):
        evaluation(tmp_path, f"x{number}", REFERENCE, name="x", adapter=adapter(number))
    entries = read_results([tmp_path])
    with pytest.raises(ValueError, match=r"found 2 entries named 'x': name one of x \(round 1\), x \(round 2\)\."):
        rank(entries, reference="x")
    with pytest.raises(ValueError, match="found no entry named 'y'"):
        rank(entries, reference="y")
    assert rank(entries, reference="x (round 2)").reference.entry.adapter["round"] == 2


def test_equal_averages_share_a_place(tmp_path):
    marks = {"best": "1111", "y": "1100", "x": "0110", "last": "1000"}
    for name, given in marks.items():
        evaluation(tmp_path, name, {"a": given})
    board = rank(read_results([tmp_path]))
    assert [(row.rank, row.name) for row in board.rows] == [(1, "best"), (2, "x"), (2, "y"), (4, "last")]


def test_intervals_are_clipped_to_what_is_possible(tmp_path):
    evaluation(tmp_path, "low", {"a": "1000"})
    evaluation(tmp_path, "high", {"a": "1110"})
    rows = by_name(rank(read_results([tmp_path])))
    assert interval(rows["low"].average)[0] == 0
    assert interval(rows["high"].average)[1] == 1
    assert interval(rows["low"].average)[1] == pytest.approx(0.25 + 1.96 * math.sqrt(0.1875 / 4))


def test_a_difference_is_marked_when_zero_lies_outside_its_interval(tmp_path):
    evaluation(tmp_path, "reference", {"a": "1" * 8 + "0" * 8})
    evaluation(tmp_path, "better", {"a": "1" * 13 + "0" * 3})
    evaluation(tmp_path, "worse", {"a": "1" * 3 + "0" * 13})
    evaluation(tmp_path, "much the same", {"a": "1" * 10 + "0" * 6})
    evaluation(tmp_path, "the same", {"a": "1" * 8 + "0" * 8})
    rows = by_name(rank(read_results([tmp_path]), reference="reference"))
    found = {name: excludes_zero(row.difference) for name, row in rows.items() if row.difference}
    assert found == {"better": True, "worse": True, "much the same": False, "the same": False}
    assert rows["worse"].difference.value == pytest.approx(-5 / 16)


def test_questions_are_matched_by_id_and_by_order_among_equal_ones(tmp_path):
    """Against numpy and plain loops: other orders, repeated questions, partly other ones."""
    draw = random.Random(0)
    marks, ids = {}, {}
    for name in ("reference", "other"):
        marks[name] = {task: "".join(draw.choice("01") for _ in range(40)) for task in "ab"}
        ids[name] = {task: [f"{task}{draw.randrange(30)}" for _ in range(40)] for task in "ab"}
        rows_hash = {"reference": "d" * 16, "other": "e" * 16}[name]
        evaluation(tmp_path, name, marks[name], ids=ids[name], rows_hash=rows_hash)
    board = rank(read_results([tmp_path]), reference="reference")
    row = by_name(board)["other"]
    means, errors, matched = [], [], 0
    for task in "ab":
        differences = []
        for question in set(ids["reference"][task]):
            turns = [
                [int(m) for m, q in zip(marks[name][task], ids[name][task], strict=True) if q == question]
                for name in ("other", "reference")
            ]
            differences += [mine - theirs for mine, theirs in zip(*turns, strict=False)]
        assert row.paired[task].questions == len(differences)
        means.append(np.mean(differences))
        errors.append(np.std(differences, ddof=1) / np.sqrt(len(differences)))
        matched += len(differences)
    assert row.difference.value == pytest.approx(np.mean(means))
    assert row.difference.standard_error == pytest.approx(np.sqrt(np.sum(np.square(errors))) / 2)
    (number,) = row.notes
    assert (
        f"Asked 80 questions of the ranked tasks, the reference 80; the difference is over the {matched}"
        in (board.notes[number - 1])
    )


def test_each_metric_has_its_own_marks(tmp_path):
    norm = {"a": "0011", "b": "11"}
    evaluation(tmp_path, "reference", {"a": "1100", "b": "10"}, norm=norm)
    evaluation(tmp_path, "other", {"a": "1---", "b": "1-"}, norm={"a": "0111", "b": "11"})
    entries = read_results([tmp_path])
    accuracy, norm, validity = (
        by_name(rank(entries, metric, "reference"))["other"]
        for metric in ("accuracy", "accuracy_norm", "format_validity")
    )
    assert (accuracy.average.value, accuracy.difference.value) == (0.375, -0.125)
    assert (norm.average.value, norm.difference.value) == (0.875, 0.125)
    assert (validity.average.value, validity.difference.value) == (0.375, -0.625)


def test_a_metric_that_an_entry_lacks_is_an_error(tmp_path):
    evaluation(tmp_path, "base", REFERENCE)
    evaluation(tmp_path, "written", REFERENCE, protocol="generate")
    entries = read_results([tmp_path])
    assert len(rank(entries).rows) == 2  # protocols may stand in one table
    with pytest.raises(ValueError, match=r"scores of accuracy_norm in .*written.results.json \(generate\), found acc"):
        rank(entries, "accuracy_norm")
    with pytest.raises(ValueError, match="Expected metric to be one of .*did you mean accuracy"):
        rank(entries, "acuracy")
    with pytest.raises(ValueError, match="Expected at least one entry to rank, found none"):
        rank([])


def test_other_prompts_are_refused_unless_asked_for(tmp_path):
    evaluation(tmp_path, "one", REFERENCE)
    evaluation(tmp_path, "two", OTHER, prompt_hash="f" * 16)
    entries = read_results([tmp_path])
    with pytest.raises(ValueError, match="prompt hash a{16} in .*one.results.json and f{16} in .*two.results.json: "):
        rank(entries)
    board = rank(entries, reference="one", allow_other_prompts=True)
    assert by_name(board)["one"].notes == ()
    assert by_name(board)["two"].notes == (1,)
    assert board.notes == (f"Asked with another prompt ({'f' * 16}) than the reference ({'a' * 16}).",)


def test_ranks_are_over_the_tasks_that_all_have(tmp_path):
    evaluation(tmp_path, "narrow", {"b": "10"}, rows_hash="d" * 16)
    evaluation(tmp_path, "wide", {"a": "1111", "b": "00", "c": "11"})
    evaluation(tmp_path, "wider", {"a": "0000", "b": "11", "c": "11"})
    board = rank(read_results([tmp_path]), reference="wide")
    assert (board.tasks, board.ranked_tasks) == (("b", "a", "c"), ("b",))
    assert [(row.rank, row.name, row.average.value) for row in board.rows] == [
        (1, "wider", 1.0),
        (2, "narrow", 0.5),
        (3, "wide", 0.0),
    ]
    assert by_name(board)["wider"].difference.value == 1.0  # over b only
    assert by_name(board)["wider"].paired["a"].value == -1.0
    assert "a" not in by_name(board)["narrow"].paired
    assert by_name(board)["narrow"].notes == ()  # another rows hash, yet the same questions of b
    text = to_text(board)
    assert "the mean over b, each task alike" in text
    assert "Not in the average, because not every entry has it: a and c." in text
    narrow = next(line for line in text.splitlines() if "narrow" in line)
    assert narrow.split("50.0 ± 35.4")[1].split() == ["-", "-", "2"]


def test_entries_without_a_common_task_are_refused(tmp_path):
    evaluation(tmp_path, "x", {"a": "10"})
    evaluation(tmp_path, "y", {"b": "10"})
    with pytest.raises(ValueError, match="a task in common, found a, b among 2 entries and none in all: leave out"):
        rank(read_results([tmp_path]))


def test_an_entry_without_outcomes_ranks_and_says_so(tmp_path):
    evaluation(tmp_path, "reference", REFERENCE)
    evaluation(tmp_path, "bare", OTHER, with_outcomes=False, rows_hash="d" * 16)
    evaluation(tmp_path, "full", OTHER)
    entries = read_results([tmp_path])
    board = rank(entries, reference="reference")
    bare = by_name(board)["bare"]
    assert (bare.rank, bare.difference, bare.paired) == (1, None, {})
    assert [board.notes[number - 1] for number in bare.notes] == [
        f"Asked other questions or tasks than the reference (rows hash {'d' * 16}): compare with care.",
        "No outcomes file beside the results: no paired differences with it.",
    ]
    assert by_name(board)["full"].difference.value == 0.125
    board = rank(entries, reference="bare")
    assert by_name(board)["full"].difference is None


def test_one_common_question_gives_no_difference(tmp_path):
    evaluation(tmp_path, "reference", {"a": "11"}, ids={"a": ["x", "y"]})
    evaluation(tmp_path, "other", {"a": "10"}, ids={"a": ["y", "z"]}, rows_hash="d" * 16)
    board = rank(read_results([tmp_path]))
    other = by_name(board)["other"]
    assert other.difference is None
    assert "Fewer than two questions of a ranked task in common with the reference: no difference." in [
        board.notes[number - 1] for number in other.notes
    ]


def entry(name, source="f", protocol="loglikelihood", number=None, revision=None):
    fields = dict(prompt_hash="", rows_hash="", settings={}, seed=0, versions={}, time="", scores={}, answers=None)
    model = {"name": "m", "revision": revision}
    return Entry(
        source=source,
        name=name,
        protocol=protocol,
        model=model,
        adapter=None if number is None else adapter(number),
        **fields,
    )


@pytest.mark.parametrize(
    ("entries", "names"),
    [
        ([entry("x"), entry("y")], ["x", "y"]),
        ([entry("x", number=1), entry("x", number=2), entry("x")], ["x (round 1)", "x (round 2)", "x"]),
        ([entry("x"), entry("x", protocol="generate")], ["x (loglikelihood)", "x (generate)"]),
        (
            [entry("x", number=1), entry("x", number=2), entry("x", number=2, protocol="generate")],
            ["x (round 1)", "x (round 2, loglikelihood)", "x (round 2, generate)"],
        ),
        ([entry("x", revision="r1"), entry("x", revision="r2")], ["x (m@r1)", "x (m@r2)"]),
        ([entry("x", source="a/f"), entry("x", source="b/f")], ["x (a/f)", "x (b/f)"]),
        ([entry("x"), entry("x"), entry("x")], ["x", "x #2", "x #3"]),
        ([entry(" x\n\x1b[31m y\t"), entry("")], ["x y", "unnamed"]),
    ],
)
def test_names_are_made_unique_by_what_tells_apart(entries, names):
    assert unique_names(entries) == names
