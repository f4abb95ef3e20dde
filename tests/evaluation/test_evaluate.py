"""Evaluation of whatever a user has, by recipes/evaluate.py."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import get_peft_model

from fslora_hf.config.recipe import parse_recipe
from fslora_hf.evaluation.scoring import evaluate
from fslora_hf.evaluation.subjects import EvaluationArguments, find_adapters
from fslora_hf.launch import held_out_rows
from tests.evaluation.test_loglikelihood import tokenizer
from tests.support import tiny
from tests.support.evaluated import KINDS, ROOT, recipe, started, train

pytest_plugins = ("tests.support.hub_client", "tests.support.evaluated", "tests.support.forked")


def results_of(base: str, output: Path, *more: str) -> tuple[list[dict], Path]:
    recipe_arguments, args, model_args, arguments = parse_recipe(KINDS, recipe(base, output, *more))
    return evaluate(arguments, args, model_args, held_out_rows(recipe_arguments, args.seed))


def test_a_whole_run_and_again_without_asking_anything_twice(run, base, monkeypatch):
    results, folder = results_of(base, run, "--adapter", str(run))
    assert folder == run / "evaluation"
    assert [result["name"] for result in results] == ["tiny-base", "mine, round 1", "mine, round 2"]
    for result, number in zip(results[1:], (1, 2), strict=True):
        in_loop = json.loads((run / "eval_rounds" / f"round-{number:04d}.loglikelihood.results.json").read_text())
        assert result["scores"] == in_loop["scores"]
        assert result["adapter"]["digest"] == in_loop["adapter"]["digest"]
        assert result["model"] == in_loop["model"] and result["rows_hash"] == in_loop["rows_hash"]
    assert not list(folder.glob(".*"))  # no journal is left
    monkeypatch.setattr("fslora_hf.evaluation.scoring.score_rows", None)
    again, _ = results_of(base, run, "--adapter", str(run))
    assert [result["time"] for result in again] == [result["time"] for result in results]
    with pytest.raises(ValueError, match="^Expected the results in .* found another's: rows_hash was .* Name another"):
        results_of(base, run, "--adapter", str(run), "--seed", "3")


def test_a_run_that_changes_the_base_is_scored_on_its_changed_base(base, run, tmp_path):
    """Each round on its own base, and the base alone, before and after, as it was."""
    folded = train(base, tmp_path / "folded", "--method", "flora")
    results, _ = results_of(base, folded, "--adapter", str(folded))
    (plain, *_), _ = results_of(base, run, "--adapter", str(run), "--results_dir", str(tmp_path / "plain"))
    assert results[0]["scores"] == plain["scores"] and results[0]["model"] == plain["model"]
    for result, number in zip(results[1:], (1, 2), strict=True):
        in_loop = json.loads((folded / "eval_rounds" / f"round-{number:04d}.loglikelihood.results.json").read_text())
        assert result["scores"] == in_loop["scores"] and result["model"] == in_loop["model"]
    assert len({result["model"]["digest"] for result in results}) == 3
    again, _ = results_of(
        base, folded, "--adapter", str(folded / "checkpoint-3"), "--with_base", "true", "--results_dir",
        str(tmp_path / "again"),
    )  # fmt: skip
    assert [result["model"] for result in again] == [result["model"] for result in results[:2]]


def test_base_adapter_and_checkpoint(run, base, tmp_path):
    whole, _ = results_of(base, run, "--adapter", str(run), "--results_dir", str(tmp_path / "run"))
    (alone,), folder = results_of(base, run, "--results_dir", str(tmp_path / "base"))
    assert alone["adapter"] is None and alone["scores"] == whole[0]["scores"]
    assert (folder / "tiny-base.loglikelihood.results.json").is_file()
    checkpoint = ("--adapter", str(run / "checkpoint-3"))
    (one,), folder = results_of(base, run, *checkpoint, "--results_dir", str(tmp_path / "one"))
    assert one["scores"] == whole[1]["scores"] and one["adapter"]["round"] == 1
    assert (folder / "mine-checkpoint-3.loglikelihood.results.json").is_file()
    both, _ = results_of(base, run, *checkpoint, "--with_base", "true", "--results_dir", str(tmp_path / "both"))
    assert [result["scores"] for result in both] == [alone["scores"], one["scores"]]
    text = ("--eval_protocol", "generate", "--eval_num_beams", "2", "--eval_max_new_tokens", "3")
    (text,), _ = results_of(base, run, *checkpoint, *text, "--results_dir", str(tmp_path))
    assert text["settings"] == {"num_beams": 2, "max_new_tokens": 3} and text["protocol"] == "generate"


def test_a_run_without_checkpoints_is_its_final_adapter(run, tmp_path):
    (found,), folder = find_adapters(str(run / "checkpoint-6"))
    assert folder is None and found.round == 2
    for name in ("adapter_config.json", "adapter_model.safetensors", "rounds.jsonl"):
        shutil.copy(run / name, tmp_path)
    (final,), folder = find_adapters(str(tmp_path))
    assert (final.label, final.round, folder) == ("final", None, tmp_path)


def _on_the_hub(arguments: list[str], run: str) -> list[dict]:
    results, _ = results_of(arguments[0], Path(run), "--adapter", arguments[1], "--results_dir", arguments[2])
    return results


def _complaint(arguments: list[str], run: str) -> str:
    try:
        _on_the_hub(arguments, run)
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.slow
def test_a_round_of_a_hub_repository(run, base, hub, on_client, tmp_path):
    files = {}
    for round, checkpoint in ((1, "checkpoint-3"), (2, "checkpoint-6")):
        files = {path.name: path.read_bytes() for path in (run / checkpoint).iterdir() if path.is_file()}
        sha = hub.add("ann/adapter", {**files, "evil.py": b"raise SystemExit"}, tag=f"round-{round:04d}")
    (local,), _ = results_of(base, run, "--adapter", str(run / "checkpoint-3"), "--results_dir", str(tmp_path / "l"))
    (first,) = on_client(_on_the_hub, [base, "ann/adapter@round-0001", str(tmp_path / "a")], str(run))
    (latest,) = on_client(_on_the_hub, [base, "ann/adapter", str(tmp_path / "b")], str(run))
    assert first["scores"] == local["scores"] and first["adapter"]["digest"] == local["adapter"]["digest"]
    assert first["adapter"]["round"] == 1 and latest["adapter"]["round"] == 2
    assert latest["adapter"]["revision"] == sha != first["adapter"]["revision"]
    assert (tmp_path / "a" / "ann-adapter-round-0001.loglikelihood.results.json").is_file()
    assert not [request for request in hub.requests if "evil" in request.path]  # nothing that could run is fetched
    for name in ("ann/adapter@round-0009", "ann/nothing"):
        complaint = on_client(_complaint, [base, name, str(tmp_path / "c")], str(run))
        assert complaint.startswith(f"Expected the adapter {name} on the Hub, found none that can be fetched (")


def test_what_cannot_be_scored_is_told(run, base, tmp_path):
    def refused(adapter: str | None, model: str = base, *more: str) -> str:
        given = [] if adapter is None else ["--adapter", adapter]
        with pytest.raises(ValueError) as error:
            results_of(model, run, *given, "--results_dir", str(tmp_path / "results"), *more)
        return str(error.value)

    assert refused("no such thing").startswith("Expected adapter to be a folder or a Hub repository (owner/name or")
    (tmp_path / "empty").mkdir()
    assert "found no adapter_config.json and no adapter_model.safetensors" in refused(str(tmp_path / "empty"))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "rounds.jsonl").write_text("")
    assert refused(str(tmp_path / "run")).startswith("Expected a finished checkpoint or an adapter in the run")
    with pytest.raises(ValueError, match="Expected adapter to be a folder or a repository, found ''"):
        EvaluationArguments(adapter="")
    checkpoint = str(run / "checkpoint-3")
    other = str(tmp_path / "other-base")
    message = refused(checkpoint, other)  # told before a model is looked for: there is none of this name
    assert message.startswith(
        f"Expected the base of the adapter {checkpoint}, {base}, found model_name_or_path={other}"
    )
    wider = tiny.base_model(torch.float32)
    wider.config.hidden_size = 32
    wider = type(wider)(wider.config)
    wider.save_pretrained(other)
    tokenizer().save_pretrained(other)
    message = refused(checkpoint, other, "--allow_other_base", "true")
    assert message.startswith("Expected a base with 16 inputs in model.layers.0.self_attn.q_proj, as the adapter")
    assert message.endswith("found a layer with 32: name the base that the adapter was trained on.")


def test_a_base_of_another_kind_has_no_such_layer(base, tmp_path):
    from fslora_hf.evaluation.subjects import check_base_shapes

    model = get_peft_model(tiny.base_model(torch.float32), tiny.lora_config(2))
    model.save_pretrained(tmp_path)
    (found,), _ = find_adapters(str(tmp_path))
    check_base_shapes(found, tiny.base_model())
    shallow = tiny.base_model()
    del shallow.model.layers[1]
    with pytest.raises(
        ValueError, match="in model.layers.1.* as the adapter .* has it, found no such layer: name the"
    ):
        check_base_shapes(replace(found, source="x"), shallow)


@pytest.mark.slow
def test_the_script_in_two_processes(run, base, run_python, tmp_path):
    """The command of the README with another launcher, since `accelerate launch` starts one process on a CPU."""
    expected, _ = results_of(base, run, "--adapter", str(run), "--results_dir", str(tmp_path / "one"))
    command = [str(ROOT / "recipes/evaluate.py"), *recipe(base, run, "--adapter", str(run))]
    done = run_python(*command, "--results_dir", str(tmp_path / "two"), processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    for result in expected:
        (path,) = [
            path
            for path in (tmp_path / "two").glob("*.results.json")
            if json.loads(path.read_text())["name"] == result["name"]
        ]
        found = json.loads(path.read_text())
        assert found["scores"] == result["scores"] and found["processes"] == 2
        assert found["name"] in done.stdout
    assert (tmp_path / "two" / "accuracy_by_round.loglikelihood.png").stat().st_size > 10_000
    assert not list((tmp_path / "two").glob(".*"))


def test_the_script_tells_problems_in_sentences(base, tmp_path):
    command = [sys.executable, str(ROOT / "recipes/evaluate.py"), *recipe(base, tmp_path, "--adapter", "nothing here")]
    done = started(command)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("Expected adapter to be a folder or a Hub repository")
