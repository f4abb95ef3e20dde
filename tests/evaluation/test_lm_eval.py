"""The task files for lm-evaluation-harness: it asks what we ask, and finds what we find, question by question."""

import importlib.util
import json
import os
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from fslora_hf.data import TASKS, completions, load_commonsense, options
from fslora_hf.data.templates import published_row
from fslora_hf.evaluation import score_rows
from tests.evaluation.test_loglikelihood import fitted, tokenizer
from tests.support import tiny

TASK_FILES = Path(__file__).resolve().parents[2] / "recipes" / "lm_eval"
NAMES = {task: f"fslora_{task.lower().replace('-', '_')}" for task in TASKS}
QUESTIONS = ["where does the sun rise", "what is ice made of; and steam", "is  it late"]
CHOICES = {"boolq": ["true", "false"], "piqa": ["east", "west"], "winogrande": ["water", "stone"]}
ONE_ROW = ("hellaswag", "winogrande")


@pytest.fixture(scope="module", autouse=True)
def lm_eval():
    return pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness: pip install lm_eval")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A few rows of every task in the published layout, of some only one; ARC has questions of 3 to 5 choices."""
    folder = tmp_path_factory.mktemp("rows")
    for task in TASKS:
        rows = []
        for number, question in enumerate(QUESTIONS[: 1 if task in ONE_ROW else None]):
            choices = CHOICES.get(task, ["a dog", "a cat", "two mice", "no one", "all of us"][: 3 + number])
            rows.append(published_row(task, question, choices, correct=(number + 1) % len(choices)))
        (folder / task).mkdir()
        (folder / task / "test.json").write_text(json.dumps(rows))
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> tuple[Path, Path]:
    """Folders of a tiny model with a byte-level tokenizer, and of an adapter that changes what it says."""
    model, adapter = tmp_path_factory.mktemp("model"), tmp_path_factory.mktemp("adapter")
    base = fitted(tiny.base_model(torch.float32))
    base.config.max_position_embeddings = 1024  # rotary: the weights do not depend on it
    base.save_pretrained(model)
    tokenizer().save_pretrained(model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        get_peft_model(base, tiny.lora_config(zero_b=False)).save_pretrained(adapter)
    return model, adapter


@pytest.fixture(scope="module")
def run(lm_eval, folder, checkpoint):
    """lm_eval on some tasks: its results, with the samples of each task in the rows' order."""
    from lm_eval.tasks import TaskManager

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FSLORA_COMMONSENSE_DIR", str(folder))
        yield lambda *tasks, **settings: lm_eval.simple_evaluate(
            model="hf",
            model_args=model_args(checkpoint),
            tasks=list(tasks),
            task_manager=TaskManager(include_path=str(TASK_FILES), include_defaults=False),
            device="cpu",
            bootstrap_iters=0,
            **settings,
        )


def model_args(checkpoint: tuple[Path, Path]) -> str:
    return f"pretrained={checkpoint[0]},peft={checkpoint[1]},dtype=float32"


def ours(checkpoint: tuple[Path, Path], rows: Dataset, **settings):
    model, adapter = checkpoint
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), adapter)
    return score_rows(model, tokenizer(), rows, **settings)


def test_log_likelihoods_and_choices_are_ours_question_by_question(run, folder, checkpoint):
    found = run("fslora_commonsense", batch_size=3)
    scores = ours(checkpoint, load_commonsense(folder, split="test"))
    outcomes = iter(scores.outcomes)
    for task, name in NAMES.items():
        samples = sorted(found["samples"][name], key=lambda sample: sample["doc_id"])
        rows = load_commonsense(folder, [task], "test")
        for sample, row in zip(samples, rows, strict=True):
            outcome = next(outcomes)
            asked = [(given, text) for given, text in sample["arguments"]]
            assert asked == [(row["prompt"], text) for text in completions(row)]
            assert options(row)[sample["target"]] == row["answer"]
            values = [value for value, _ in sample["filtered_resps"]]
            assert max(abs(a - b) for a, b in zip(values, outcome.log_likelihoods, strict=True)) < 1e-4
            assert outcome.options[values.index(max(values))] == outcome.choice
            assert sample["acc"] == (outcome.choice == row["answer"])
            assert sample["acc_norm"] == (outcome.choice_norm == row["answer"])
    assert next(outcomes, None) is None
    macro = found["groups"]["fslora_commonsense"]
    right = [outcome.correct for outcome in scores.outcomes]
    assert macro["acc,none"] == pytest.approx(scores.metrics["accuracy"]["accuracy"])
    assert macro["acc,none"] != pytest.approx(sum(right) / len(right))  # of this adapter: each task counts the same
    assert macro["acc_norm,none"] == pytest.approx(scores.metrics["accuracy_norm"]["accuracy"])


def test_a_task_is_read_from_its_file_alone(run, folder, monkeypatch, tmp_path):
    (tmp_path / "boolq").mkdir()
    (tmp_path / "boolq" / "test.json").write_text((folder / "boolq" / "test.json").read_text())
    monkeypatch.setenv("FSLORA_COMMONSENSE_DIR", str(tmp_path))
    assert list(run("fslora_boolq")["results"]) == ["fslora_boolq"]
    with pytest.raises(FileNotFoundError, match="Expected the file of every named task, found no .*piqa"):
        run("fslora_boolq", "fslora_piqa")


def test_without_a_folder_the_originals_are_read(folder, monkeypatch):
    spec = importlib.util.spec_from_file_location("task_file_utils", TASK_FILES / "utils.py")
    utils = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(utils)
    monkeypatch.delenv("FSLORA_COMMONSENSE_DIR", raising=False)
    monkeypatch.setattr(utils, "load_originals", lambda tasks, split: load_commonsense(folder, tasks, split))
    rows = utils.load(task="boolq", pretrained="a model's argument")["test"]
    assert rows["prompt"][:] == load_commonsense(folder, ["boolq"], "test")["prompt"][:]


def test_what_the_model_writes_is_judged_by_the_first_answer(run, folder, monkeypatch):
    from lm_eval.models.huggingface import HFLM

    texts = {}

    def write(self, requests, disable_tqdm=False):
        """Names an option, then goes on with a prompt of its own."""
        for number, request in enumerate(requests):
            prompt, settings = request.args
            assert settings == {"do_sample": False, "num_beams": 4, "max_gen_toks": 32, "until": []}
            names = options({"prompt": prompt})
            texts[prompt] = names[number % 2]
        return [f" it is {texts[request.args[0]]}### Response: {options(request.doc)[0]}" for request in requests]

    monkeypatch.setattr(HFLM, "generate_until", write)
    found = run("fslora_commonsense_generate")
    right = {}
    for task, name in NAMES.items():
        rows = load_commonsense(folder, [task], "test")
        samples = sorted(found["samples"][f"{name}_generate"], key=lambda sample: sample["doc_id"])
        assert [sample["filtered_resps"] for sample in samples] == [[texts[row["prompt"]]] for row in rows]
        right[task] = sum(texts[row["prompt"]] == row["answer"] for row in rows) / len(rows)
        assert found["results"][f"{name}_generate"]["exact_match,first_answer"] == pytest.approx(right[task])
    assert len(set(right.values())) > 1
    macro = found["groups"]["fslora_commonsense_generate"]["exact_match,first_answer"]
    assert macro == pytest.approx(sum(right.values()) / len(right))


@pytest.mark.slow
def test_the_command_of_the_readme(folder, checkpoint, run_python, tmp_path):
    """Both protocols by the console script, with a real generation, which names no answer."""
    tasks = "fslora_boolq,fslora_piqa_generate"
    command = ["-m", "lm_eval", "--model", "hf", "--model_args", model_args(checkpoint)]
    command += ["--include_path", str(TASK_FILES), "--tasks", tasks, "--device", "cpu", "--batch_size", "1"]
    command += ["--output_path", str(tmp_path), "--log_samples"]
    env = os.environ | {"FSLORA_COMMONSENSE_DIR": str(folder)}
    done = run_python(*command, env=env, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (results,) = tmp_path.rglob("results_*.json")
    results = json.loads(results.read_text())["results"]
    assert results["fslora_boolq"]["acc,none"] in [pytest.approx(n / 3) for n in range(4)]
    assert results["fslora_piqa_generate"]["exact_match,first_answer"] == 0
    (samples,) = tmp_path.rglob("samples_fslora_piqa_generate_*.jsonl")
    samples = [json.loads(line) for line in samples.read_text().splitlines()]
    assert len(samples) == 3 and all(sample["resps"][0][0] for sample in samples)


@pytest.mark.slow
def test_the_comparison_counts_and_times_both(folder, checkpoint, run_python, tmp_path):
    model, adapter = checkpoint
    script = TASK_FILES.parent / "benchmarks" / "lm_eval_agreement.py"
    command = [script, "--model", model, "--adapter", adapter, "--data_dir", folder]
    command += ["--tasks", "boolq", "piqa", "--whole", "boolq", "--rows", "2", "--texts", "2", "--default_rows", "2"]
    output = tmp_path / "new" / "agreement.json"
    command += ["--batch_size", "8", "--cpu", "--output", output]
    done = run_python(*command)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(output.read_text())
    rows = {
        protocol: {task: each["rows"] for task, each in tasks.items()} for protocol, tasks in found["tasks"].items()
    }
    assert rows == {"loglikelihood": {"boolq": 3, "piqa": 2}, "generate": {"boolq": 2, "piqa": 2}}
    for total in found["totals"].values():
        assert total["same"] + total["near"] == total["rows"] and total["seconds"] > 0 < total["harness_seconds"]
    assert found["harness at its default batch size of 1"]["rows"] == 4
    assert list(output.parent.iterdir()) == [output]
