"""The metric against counts by hand, and loaded as its users load it: from its folder, offline, by several at once."""

import ast
import json
import os
import subprocess
import sys

import evaluate
import pytest

from fslora_hf.data import TASKS, load_miniature, options
from fslora_hf.evaluation.metric import FOLDER, first_answer, load_metric

TEXTS = {
    "predictions": [
        "the correct answer is answer2",
        "answer1, or else answer2",
        "True",
        "the correct answer is false",
        "",
        "the correct answer is answer5",
    ],
    "references": ["answer2", "answer2", "true", "false", "true", "answer1"],
    "task": ["ARC-Easy", "ARC-Easy", "boolq", "boolq", "boolq", "social_i_qa"],
}


@pytest.fixture
def metric():
    return evaluate.load(str(FOLDER), keep_in_memory=True)


def test_texts_are_scored_by_task_and_averaged_over_tasks(metric):
    scores = metric.compute(**TEXTS)
    assert list(scores["tasks"]) == ["ARC-Easy", "boolq", "social_i_qa"]
    assert scores["tasks"]["ARC-Easy"] == {
        "accuracy": 0.5,
        "standard_error": pytest.approx(0.125**0.5),
        "format_validity": 1.0,
        "format_validity_standard_error": 0.0,
        "majority_rate": 1.0,
        "rows": 2,
        "invalid": 0,
    }
    assert scores["tasks"]["boolq"] == {
        "accuracy": pytest.approx(1 / 3),
        "standard_error": pytest.approx((2 / 27) ** 0.5),
        "format_validity": pytest.approx(1 / 3),
        "format_validity_standard_error": pytest.approx((2 / 27) ** 0.5),
        "majority_rate": pytest.approx(2 / 3),
        "rows": 3,
        "invalid": 2,
    }
    assert scores["tasks"]["social_i_qa"]["invalid"] == 0  # it has three answers, the published rule finds five
    assert scores["accuracy"] == pytest.approx((1 / 2 + 1 / 3 + 0) / 3)
    assert scores["standard_error"] == pytest.approx((1 / 8 + 2 / 27) ** 0.5 / 3)
    assert scores["format_validity"] == pytest.approx((1 + 1 / 3 + 1) / 3)
    assert scores["format_validity_standard_error"] == pytest.approx((2 / 27) ** 0.5 / 3)
    assert scores["majority_rate"] == pytest.approx((1 + 2 / 3 + 1) / 3)
    assert scores["rows"] == 6 and scores["invalid"] == 2


def test_options_give_the_scores_of_the_texts_that_name_them(metric):
    chosen, right = [1, 0, -1, 1, -1, 4], [1, 1, 0, 1, 0, 0]
    assert metric.compute(predictions=chosen, references=right, task=TEXTS["task"]) == metric.compute(**TEXTS)
    anything = metric.compute(predictions=[7, 7], references=[7, 0], task=["my task", "my task"])
    assert anything["tasks"]["my task"]["accuracy"] == 0.5


def test_every_answer_of_every_task_is_known(metric):
    rows = load_miniature("test", rows_per_task=12)
    assert set(rows["task"]) == set(TASKS)
    for row in rows:
        for name in options(row):
            assert first_answer(f"the correct answer is {name}", row["task"]) == name
    scores = metric.compute(predictions=rows["completion"][:], references=rows["answer"][:], task=rows["task"][:])
    assert scores["accuracy"] == scores["format_validity"] == 1 and scores["rows"] == len(rows)


@pytest.mark.parametrize(
    ("text", "task", "choice"),
    [
        ("option2 rather than option1", "winogrande", "option2"),
        ("Solution1", "piqa", None),
        ("answer6", "openbookqa", None),
        ("ending12", "hellaswag", "ending1"),
        ("Answer format: true/false\n\n### Response: false", "boolq", "false"),
        ("true ### Response: ### Response: false", "boolq", None),
    ],
)
def test_the_first_answer_after_the_response_mark_counts(text, task, choice):
    assert first_answer(text, task) == choice


def test_answers_of_further_tasks(metric):
    counts = {"counts": ["1", "12"], "boolq": ["yes", "no"]}
    assert first_answer("about 12", "counts", counts["counts"]) == "12"
    scores = metric.compute(
        predictions=["12", "true"], references=["12", "no"], task=["counts", "boolq"], answers=counts
    )
    assert [score["format_validity"] for score in scores["tasks"].values()] == [1, 0]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ((["true"], ["true"], ["bool"], None), "Expected a task out of ARC-Challenge, .*, winogrande, found 'bool': "),
        (
            (["x"], ["answer6"], ["piqa"], None),
            "a reference out of solution1, solution2 in the task 'piqa', found",
        ),
        ((["x"], ["x"], ["mine"], {"mine": "xyz"}), "answers of the task 'mine' to be a list of texts.*found 'xyz': "),
        (
            (["x"], ["x"], ["mine"], {"mine": ["x", ""]}),
            r"texts, none of them empty, found \['x', ''\]",
        ),
        (([-2], [0], ["mine"], None), "found prediction -2 and reference 0 in question 0 "),
        (([0, 0], [0, -1], ["mine"] * 2, None), "found prediction 0 and reference -1 in question 1 "),
        ((["true", None], ["true"] * 2, ["boolq"] * 2, None), "found None in question 1 "),
    ],
)
def test_rows_that_cannot_be_scored_are_refused_and_leave_nothing_behind(rows, message):
    predictions, references, task, answers = rows
    metric = load_metric()
    with pytest.raises(ValueError, match=message):
        metric.compute(predictions=predictions, references=references, task=task, answers=answers)
    assert metric.compute(**TEXTS)["rows"] == 6


def test_a_loaded_metric_holds_no_rows_of_one_loaded_before():
    load_metric().add_batch(predictions=[0], references=[0], task=["mine"])
    assert load_metric().compute(**TEXTS)["rows"] == 6


def test_batches_combinations_and_saved_scores(metric, tmp_path):
    """Combined with a metric that a user has on disk and that takes no column `task`."""
    folder = tmp_path / "text_length"
    folder.mkdir()
    (folder / "text_length.py").write_text(
        """
import datasets
import evaluate


class TextLength(evaluate.Metric):
    def _info(self):
        text = datasets.Value("string")
        features = datasets.Features({"predictions": text, "references": text})
        return evaluate.MetricInfo(description="", citation="", inputs_description="", features=features)

    def _compute(self, predictions, references):
        return {"characters": sum(map(len, predictions)), "rows": len(references)}
"""
    )
    alone = metric.compute(**TEXTS)
    combined = evaluate.combine([metric, evaluate.load(str(folder), keep_in_memory=True)])
    for part in (slice(0, 1), slice(1, 6)):
        combined.add_batch(**{name: column[part] for name, column in TEXTS.items()})
    scores = combined.compute()
    assert scores.pop("characters") == sum(map(len, TEXTS["predictions"]))
    assert scores.pop("text_length_rows") == scores.pop("commonsense_qa_rows") == alone["rows"]
    assert scores == {key: value for key, value in alone.items() if key != "rows"}
    saved = evaluate.save(tmp_path / "scores.json", **alone)
    assert alone.items() <= json.loads(saved.read_text()).items()


def test_the_file_stands_alone_and_its_card_tells_the_truth(metric):
    tree = ast.parse((FOLDER / "commonsense_qa.py").read_text())
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    names = [node.module if isinstance(node, ast.ImportFrom) else node.names[0].name for node in imports]
    assert {name for name in names if name not in sys.stdlib_module_names} == {"datasets", "evaluate"}
    assert all(len(node.names) == 1 for node in imports)  # evaluate reads them line by line
    card = (FOLDER / "README.md").read_text()
    blocks = [block.split("```")[0] for block in card.split("```python\n")[1:]]
    assert len(blocks) == 3
    for call in blocks[:2]:
        room = {"metric": metric}
        exec(call.replace('evaluate.load("commonsense_qa")', "metric"), room)
        assert room["scores"] == ast.literal_eval(blocks[2])


SCRIPT = """
import os
import socket
import sys
import time
from pathlib import Path

print("starts")
connections = []
socket.socket.connect = lambda self, address: connections.append(address)
socket.getaddrinfo = lambda *address, **options: connections.append(address)

from fslora_hf.evaluation.metric import _evaluate, load_metric

if __name__ == "__main__":
    if sys.argv[2] == "again":
        import evaluate  # this script
    _evaluate()
    Path(sys.argv[1], str(os.getpid())).touch()
    while len(os.listdir(sys.argv[1])) < 2:
        time.sleep(0.01)
    scores = load_metric().compute(predictions=["true"], references=["true"], task=["boolq"])
    import evaluate

    assert evaluate.load and sys.path[0] == str(Path(__file__).parent) and not connections, connections
    print("accuracy", scores["accuracy"])
"""


@pytest.mark.slow
def test_a_script_called_evaluate_in_two_processes_at_once(tmp_path):
    """Neither takes itself for the package `evaluate`, stumbles over the other's cache, or asks for a connection."""
    (tmp_path / "evaluate.py").write_text(SCRIPT)
    (tmp_path / "ready").mkdir()
    env = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    env["HF_HOME"] = str(tmp_path / "hf")  # an empty cache of modules
    command = [sys.executable, str(tmp_path / "evaluate.py"), str(tmp_path / "ready")]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    started = {number: subprocess.Popen([*command, number], env=env, **pipes) for number in ("once", "again")}
    for number, process in started.items():
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
        assert out.splitlines() == ["starts"] * (1 + (number == "again")) + ["accuracy 1.0"]
