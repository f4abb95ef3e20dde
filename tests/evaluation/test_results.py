"""Result files, and scores that come from the metric."""

import json
import math

import pytest
import torch
from datasets import Dataset
from peft import get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file

from fslora_hf.data import load_miniature
from fslora_hf.data.prompts import PROMPT_TEMPLATE, prompt_hash
from fslora_hf.evaluation import Generate, Loglikelihood
from fslora_hf.evaluation import outcomes as outcomes_module
from fslora_hf.evaluation.outcomes import Outcome, question_id, rows_hash, summarise
from fslora_hf.evaluation.results import AdapterSource, Subject, find_results, identity, make_results, write_results
from fslora_hf.models.description import ModelSource, adapter_digest, describe_model
from fslora_hf.reports.accuracy import plot_accuracy, results_table
from tests.support import tiny

MODEL = ModelSource("org/base", "fedcba9876543210", dtype="float32")
ADAPTER = AdapterSource("outputs/run/checkpoint-8", "0123456789abcdef", round=2)


def chosen(task: str, answer: str, choice: str | None, choice_norm: str | None = None, number: int = 0) -> Outcome:
    values = (-1.0, -2.0) if choice else (math.nan, -2.0)
    return Outcome(
        f"{number:016x}", task, answer, ("a", "b"), choice, values, choice_norm or choice, finite=bool(choice)
    )


@pytest.fixture
def scores():
    given = [("x", "a", "a"), ("x", "a", "b"), ("x", "b", "b"), ("x", "a", "a"), ("y", "b", "b"), ("y", "a", None)]
    return summarise("loglikelihood", [chosen(*each, number=i) for i, each in enumerate(given)])


@pytest.fixture(scope="module")
def rows() -> Dataset:
    return load_miniature("test", ["boolq", "piqa"], rows_per_task=12)


def test_scores_by_hand(scores):
    lines = {(line["task"], line["metric"]): line for line in scores.table()}
    assert list(lines) == [
        *((task, metric) for metric in ("accuracy", "accuracy_norm") for task in ("x", "y", "average")),
        *((task, "format_validity") for task in ("x", "y", "average")),
    ]
    assert lines["x", "accuracy"]["value"] == 0.75 and lines["x", "accuracy"]["rows"] == 4
    assert lines["x", "accuracy"]["standard_error"] == pytest.approx(math.sqrt(0.75 * 0.25 / 4))
    assert lines["y", "accuracy"]["value"] == 0.5 and lines["average", "accuracy"]["value"] == 0.625
    by_task = [lines[task, "accuracy"]["standard_error"] for task in "xy"]
    assert lines["average", "accuracy"]["standard_error"] == pytest.approx(math.hypot(*by_task) / 2)
    assert lines["x", "accuracy"]["majority_rate"] == 0.75 and lines["average", "accuracy"]["rows"] == 6
    validity = lines["y", "format_validity"]
    assert (validity["value"], validity["standard_error"]) == (0.5, pytest.approx(math.sqrt(0.25 / 2)))
    assert lines["average", "format_validity"]["standard_error"] == pytest.approx(math.sqrt(0.25 / 2) / 2)
    assert scores.not_finite == 1 and scores.tasks["y"].invalid == 1


def test_every_score_comes_from_the_metric(monkeypatch):
    class Fake:
        def compute(self, **inputs):
            asked.append(inputs)
            return {"accuracy": 0.125, "tasks": {}}

    asked: list[dict] = []
    monkeypatch.setattr(outcomes_module, "load_metric", Fake)
    norm = [chosen("x", "a", "b", "a"), chosen("x", "b", None)]
    assert summarise("loglikelihood", norm).metrics["accuracy_norm"]["accuracy"] == 0.125
    assert [call["predictions"] for call in asked] == [[1, -1], [0, -1]]
    assert asked[0]["references"] == [0, 1] and asked[0]["task"] == ["x", "x"]
    text = Outcome("0", "boolq", "true", ("true", "false"), "true", text="true")
    assert summarise("generate", [text]).metrics.keys() == {"accuracy"} and len(asked) == 3


def make(rows, scores, subject=None, protocol=None):
    subject = subject or Subject("run, round 2", MODEL, ADAPTER)
    protocol = protocol or Loglikelihood()
    return make_results(subject, protocol, rows, scores, seed=7, seconds=1.23456, processes=2, batch_size=8)


def test_result_files_hold_what_the_scores_depend_on(rows, scores, tmp_path):
    path = write_results(tmp_path, "round-0002.loglikelihood", make(rows, scores), scores)
    assert sorted(found.name for found in tmp_path.iterdir()) == [
        "round-0002.loglikelihood.outcomes.jsonl",
        "round-0002.loglikelihood.results.json",
    ]
    found = json.loads(path.read_text())
    assert found["format"] == 1 and found["name"] == "run, round 2" and found["seed"] == 7
    named = {"name": "org/base", "digest": MODEL.digest, "revision": None, "dtype": "float32", "quantization": None}
    assert found["model"] == named
    assert found["adapter"]["digest"] == ADAPTER.digest and found["adapter"]["round"] == 2
    assert found["prompt_hash"] == prompt_hash([]) and found["rows_hash"] == rows_hash(rows)
    assert found["scores"] == scores.table() and found["not_finite"] == 1
    assert found["versions"]["torch"] == torch.__version__ and found["time"].endswith("+00:00")
    assert (found["processes"], found["batch_size"], found["seconds"]) == (2, 8, 1.235)
    lines = (tmp_path / found["outcomes"]).read_text().splitlines()
    assert [Outcome.from_record(json.loads(line)).choice for line in lines] == ["a", "b", "b", "a", "b", None]
    assert json.loads(lines[5])["log_likelihoods"] == [None, -2.0] and json.loads(lines[0])["correct"] is True


def test_standing_results_are_found_and_those_of_another_evaluation_refused(rows, scores, tmp_path):
    subject, protocol = Subject("a name", MODEL, ADAPTER), Generate()
    wanted = identity(subject, protocol, rows)
    assert find_results(tmp_path, "x", wanted) is None
    path = write_results(tmp_path, "x", make(rows, scores, subject, protocol), scores)
    assert find_results(tmp_path, "x", wanted) == json.loads(path.read_text())
    moved = ModelSource("elsewhere/base", MODEL.digest, dtype="float32")
    renamed = identity(Subject("another name", moved, ADAPTER), protocol, rows)
    assert find_results(tmp_path, "x", renamed) is not None
    others = {
        "rows_hash": identity(subject, protocol, rows.select([1, 0])),
        "settings": identity(subject, Generate(num_beams=1), rows),
        "adapter": identity(Subject("a name", MODEL, None), protocol, rows),
        "model": identity(
            Subject("a name", ModelSource("org/base", MODEL.digest, dtype="bfloat16"), ADAPTER), protocol, rows
        ),
    }
    for key, other in others.items():
        with pytest.raises(ValueError, match=rf"^Expected the results in .* of this evaluation, found .*: {key} was"):
            find_results(tmp_path, "x", other)
    path.write_text("{")
    with pytest.raises(ValueError, match="^Expected results of this project in .*, found damage"):
        find_results(tmp_path, "x", wanted)


def test_hashes_follow_what_they_stand_for(rows):
    assert question_id(rows[0]) != question_id(rows[1]) and len(question_id(rows[0])) == 16
    assert question_id(rows[0]) != question_id({**rows[0], "task": "other"})
    assert rows_hash(rows) != rows_hash(rows.select(range(len(rows) - 1, -1, -1)))
    assert rows_hash(rows) != rows_hash(rows.map(lambda row, i: {"answer": "x"} if i == 3 else row, with_indices=True))
    assert prompt_hash(rows["prompt"]) == prompt_hash(["### Instruction:\nanything\n\n### Response:"])
    assert prompt_hash(["Question: anything\nAnswer:"]) == prompt_hash(["another"]) != prompt_hash([])
    assert "{instruction}" in PROMPT_TEMPLATE


def test_an_adapters_digest_is_the_same_in_memory_and_on_disk(tmp_path):
    model = get_peft_model(tiny.base_model(torch.float32), tiny.lora_config(zero_b=False))
    here = adapter_digest(get_peft_model_state_dict(model))
    model.save_pretrained(tmp_path)
    assert adapter_digest(load_file(tmp_path / "adapter_model.safetensors")) == here
    with torch.no_grad():
        next(p for p in model.parameters() if p.requires_grad).view(-1)[0] += 1e-6
    assert adapter_digest(get_peft_model_state_dict(model)) != here
    described = describe_model(model.get_base_model())
    assert described == describe_model(tiny.base_model(torch.float32)) and described.dtype == "float32"
    with torch.no_grad():
        for parameter in model.get_base_model().parameters():
            parameter.mul_(1.001)
    assert describe_model(model.get_base_model()).digest != described.digest


def test_table_and_figure(rows, scores, tmp_path):
    base = make(rows, scores, Subject("base", MODEL))
    later = [make(rows, scores, Subject(f"round {n}", MODEL, AdapterSource("x", "0", round=n))) for n in (1, 2)]
    lines = results_table([base, *later]).split("\n\n")[0].splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == [
        "base", "round 1", "round 2", "most common answer", "questions",
    ]  # fmt: skip
    assert "75.0 ± 21.7" in lines[2] and "62.5" in lines[2] and len({line.count("|") for line in lines}) == 1
    assert "average per character" in lines[0]
    assert "base: in 1 questions the model computed something that is not a number" in results_table([base])
    text = summarise("generate", [Outcome("0", "boolq", "true", ("true", "false"), "true", text="true")])
    alone = results_table([make(rows, text, protocol=Generate())])
    assert "average per character" not in alone and "100.0 ± 0.0" in alone and "usable answers" in alone
    assert plot_accuracy([*later, base], tmp_path).stat().st_size > 10_000
