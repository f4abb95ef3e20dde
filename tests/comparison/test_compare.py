"""Comparisons: what their files mean, what is refused, and what becomes of their runs."""

import dataclasses
import io
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fslora_hf.common.settings import SettingsError
from fslora_hf.comparison.arguments import parse_comparison
from fslora_hf.comparison.folder import Folder
from fslora_hf.comparison.launching import Launcher, Progress, run_all
from fslora_hf.comparison.results import is_done, share_done
from fslora_hf.comparison.runs import runs_of
from fslora_hf.comparison.splits import check_unchanged, splits_of
from fslora_hf.storage.locks import LOCK_NAME, lock_file
from recipes import compare
from tests.support import compared

ROOT = Path(__file__).parents[2]
STAND_IN = Path(compared.__file__)
NOW = ("global_rank", "local_steps", "num_clients", "sketching_ratio")
LATER = ("methods", "sketching_equal_upload", "top_k")  # tests/comparison/test_compare_budget.py


@pytest.fixture
def plan(tmp_path):
    """(variants, runs) of a comparison with some changes, and more arguments."""

    def make(*args, **changes):
        return runs_of(parse_comparison([*compared.write_comparison(tmp_path, **changes), *args]))

    return make


@pytest.fixture
def problems_of(plan):
    def make(*args, **changes):
        with pytest.raises(SettingsError) as caught:
            plan(*args, **changes)
        return caught.value.problems

    return make


@pytest.fixture
def main(tmp_path, monkeypatch, capsys):
    """The script with a stand-in for training; returns its exit code or message, and what it printed."""

    def run(*args, **changes):
        monkeypatch.setattr(compare, "SCRIPT", STAND_IN)
        monkeypatch.setattr(compare, "write_report", _write_numbers)  # drawing takes seconds
        monkeypatch.setattr(sys, "argv", ["compare.py", *compared.write_comparison(tmp_path, **changes), *args])
        try:
            compare.main()
            code = 0
        except SystemExit as error:
            code = error.code
        return code, capsys.readouterr()

    return run


def _write_numbers(summary: dict, folder: Path) -> None:
    (folder / "comparison.json").write_text(json.dumps(summary))


# ---- what a file means ----


def test_methods_laws_cases_and_seeds_are_crossed(plan):
    laws = {"even": {"client_ranks": [2, 2, 2]}, "mixed": {"rank_distribution": "uniform", "min_rank": 1}}
    variants, runs = plan(rank_laws=laws, cases={"short": {}, "long": {"local_steps": 9}}, recipe={"max_rank": 3})
    assert len(variants) == 8 and len(runs) == 16 and len({run.name for run in runs}) == 16
    assert [variants[i].label for i in (0, 1, 2, 7)] == [
        "short, even, fslora",
        "short, even, hetlora",
        "short, mixed, fslora",
        "long, mixed, hetlora",
    ]
    assert [variant.reference for variant in variants] == [None, 0, None, 2, None, 4, None, 6]
    assert [run.seed for run in runs] == [1] * 8 + [2] * 8
    last = runs[-1]
    assert (last.args.method, last.args.local_steps, last.args.num_rounds, last.args.eval_rounds) == (
        "hetlora",
        9,
        4,
        2,
    )
    # A law takes the place of the recipe's ranks as a whole: its max_rank does not stay beside them.
    assert (runs[0].args.client_ranks, runs[0].args.max_rank) == ([2, 2, 2], None)
    assert (last.args.rank_distribution, last.args.min_rank, last.args.max_rank) == ("uniform", 1, None)
    assert last.args.output_dir.endswith("out/runs/long-mixed-hetlora-seed2")


def test_with_one_method_cases_are_compared_with_the_first(plan):
    variants, _ = plan(methods=["fslora"], cases={"a": {}, "b": {"local_steps": 2}, "c": {"local_steps": 3}})
    assert [(variant.label, variant.reference) for variant in variants] == [("a", None), ("b", 0), ("c", 0)]


def test_the_command_line_is_over_the_settings_of_all_runs(plan):
    _, runs = plan("--local_steps", "7", "--seeds", "5", "--weight_decay=0.1", settings={"local_steps": 3})
    assert {run.args.local_steps for run in runs} == {7} and {run.args.weight_decay for run in runs} == {0.1}
    assert {run.seed for run in runs} == {5}


def test_ranks_on_the_command_line_replace_those_of_the_settings(plan):
    mixed = {"rank_distribution": "uniform", "min_rank": 1, "max_rank": 3}
    _, runs = plan("--client_ranks", "2", "2", "2", settings=mixed)
    assert {tuple(run.args.client_ranks) for run in runs} == {(2, 2, 2)}


def test_a_recipes_own_budget_of_bytes_does_not_end_runs_of_equal_rounds(plan):
    _, runs = plan(recipe={"upload_budget": 1.0})
    assert {run.args.upload_budget for run in runs} == {None} and {run.args.num_rounds for run in runs} == {4}


def test_everything_that_is_wrong_is_told_at_once(tmp_path, problems_of):
    found = problems_of("--lerning_rate", "1", settings={"local_stepz": 3, "seed": 4}, cases={"a": {"num_rounds": 3}})
    assert found == [
        "Expected only settings that exist on the command line, found lerning_rate: did you mean learning_rate?",
        "Expected only settings that exist under settings, found local_stepz: did you mean local_steps?",
        "Expected num_rounds under cases: a to be left to the comparison, found 3: set rounds.",
    ]
    assert "did you mean methods?" in problems_of(method="fslora")[0]
    found = problems_of(rounds=None, methods=["fslor"], seeds=[1, 1], recipe="")
    assert [text.split(",")[0] for text in found] == [
        "Expected seeds to be all different",
        "Expected method to be one of fslora",
        "Expected one budget",
    ]
    assert problems_of(upload_megabytes=3.0)[0].endswith("found both: keep one of the two.")


def test_every_runs_own_recipe_is_checked(problems_of):
    (text,) = problems_of(cases={"good": {}, "bad": {"max_rank": 9}}, methods=["fslora"])
    assert text.startswith("In bad-seed1 and 1 more: Expected max_rank to be at most lora_r (4), found 9")
    (text,) = problems_of(settings={"save_rounds": 0}, seeds=[1], methods=["fslora"])
    assert text.startswith("In fslora-seed1: Expected save_rounds to be above 0 in a comparison")


@pytest.mark.parametrize("ranks", [{"max_rank": 3}, {"rank_distribution": "uniform"}, {"client_ranks": [4, 4, 1]}])
def test_a_method_of_one_rank_is_told_its_ranks(plan, problems_of, ranks):
    mixed = {"methods": ["fslora", "fedit"], "seeds": [1], "rank_laws": {"mixed": ranks}}
    (text,) = problems_of(**mixed)
    assert text.startswith("In fedit-seed1: Expected every client to have the global rank 4 with method=fedit, found ")
    _, runs = plan(**mixed, method_settings={"fedit": {"client_ranks": None, "lora_r": 2}})
    assert (runs[1].model.lora_r, runs[1].args.client_ranks, runs[1].args.max_rank) == (2, None, None)
    assert runs[0].model.lora_r == 4


def test_runs_that_would_differ_in_data_or_scoring_are_refused(plan, problems_of):
    for setting in ({"eval_rows_per_task": 6}, {"train_rows_per_task": 12}, {"eval_protocol": "loss"}):
        (text,) = problems_of(cases={"a": {}, "b": setting}, methods=["fslora"])
        assert text.startswith(f"Expected {next(iter(setting))} to be the same in all runs, found ")
    assert len(plan(cases={"a": {}, "b": {"num_clients": 4}}, methods=["fslora"])[1]) == 4


def test_a_case_is_not_levelled_by_the_command_line(problems_of):
    (text,) = problems_of("--lora_r", "8", cases={"a": {"lora_r": 2}, "b": {}})
    assert text.startswith("Expected lora_r on the command line to be one of no case, found 8: leave it out")


@pytest.mark.parametrize("name", NOW)
def test_every_comparison_is_read(name):
    """Its runs, too, each as a recipe of its own."""
    compared.check_comparison(ROOT / "recipes/comparisons" / f"{name}.yaml")


def test_the_comparisons_are_those_of_the_paper():
    assert {file.stem for file in (ROOT / "recipes/comparisons").iterdir()} == {*NOW, *LATER}


# ---- rows ----


def test_rows_are_counted_by_client_and_task_before_anything_runs(plan):
    _, runs = plan(cases={"few": {}, "many": {"num_clients": 6}}, recipe={"rank_distribution": "uniform"})
    splits = splits_of(runs)
    assert [(split.seed, len(split.counts), len(split.runs)) for split in splits] == [
        (1, 3, 2),
        (1, 6, 2),
        (2, 3, 2),
        (2, 6, 2),
    ]
    for split in splits:
        assert split.tasks == ("boolq", "piqa") and [sum(column) for column in zip(*split.counts, strict=True)] == [
            24,
            24,
        ]
        assert all(len(ranks) == len(split.counts) and set(ranks) <= {1, 2, 3, 4} for ranks in split.ranks.values())
    assert splits[0].rows == splits[1].rows != splits[2].rows
    check_unchanged(runs, splits)
    with pytest.raises(ValueError, match="rows of iid, 3 clients, seed 1 to stay as they were"):
        check_unchanged(runs, [dataclasses.replace(splits[0], rows="other"), *splits[1:]])


# ---- runs ----


def test_a_run_is_done_with_its_last_evaluation_and_checkpoint(plan, tmp_path):
    run, folder = plan()[1][0], tmp_path / "run"
    assert not is_done(run, folder) and share_done(run, folder) == 0
    compared.write_run(folder, 3, {2: (1.0, 0.5), 3: (1.0, 0.5)})
    assert not is_done(run, folder) and share_done(run, folder) == 0.75
    compared.write_run(folder, 4, {2: (1.0, 0.5)})
    assert not is_done(run, folder)
    compared.write_run(folder, 4, {2: (1.0, 0.5), 4: (1.0, 0.5)})
    assert is_done(run, folder)
    (folder / "eval_rounds" / "round-0004.loglikelihood.results.json").unlink()
    assert not is_done(run, folder)
    compared.write_run(folder, 4, {4: (1.0, None)})  # the loss alone was asked for
    assert is_done(run, folder)


def test_a_run_is_done_with_its_bytes(plan, tmp_path):
    run = plan()[1][0]
    run = dataclasses.replace(run, settings=run.settings | {"upload_budget": 2.5})
    compared.write_run(tmp_path / "run", 2, {2: (1.0, 0.5)})
    assert share_done(run, tmp_path / "run") == 0.8 and not is_done(run, tmp_path / "run")
    compared.write_run(tmp_path / "run", 3, {3: (1.0, 0.5)})
    assert is_done(run, tmp_path / "run")


def test_every_run_is_run_once_and_never_again(main, tmp_path):
    code, printed = main()
    assert code == 0 and "run 4 of 4, hetlora-seed2: done in" in printed.err
    logs = {path.name: path.read_text() for path in (tmp_path / "out" / "logs").iterdir()}
    assert sorted(logs) == [f"{method}-seed{seed}.log" for method in ("fslora", "hetlora") for seed in (1, 2)]
    assert all(text.count("training") == 1 for text in logs.values())
    first = (tmp_path / "out" / "comparison.json").read_text()
    code, printed = main()
    assert code == 0 and printed.err.count("done already") == 4
    assert {path.name: path.read_text() for path in (tmp_path / "out" / "logs").iterdir()} == logs
    assert (tmp_path / "out" / "comparison.json").read_text() == first
    # More seeds are more runs of the same comparison.
    code, printed = main("--seeds", "1", "2", "3")
    assert code == 0 and printed.err.count("done already") == 4 and printed.err.count(": starts") == 2


def test_the_report_of_a_whole_comparison_is_not_written_over_by_a_part(main, tmp_path):
    assert main()[0] == 0
    first = {path: path.read_bytes() for path in (tmp_path / "out").iterdir() if path.is_file()}
    code, _ = main("--methods", "fslora")
    assert "found no hetlora-seed1, hetlora-seed2 asked for" in code
    assert {path: path.read_bytes() for path in (tmp_path / "out").iterdir() if path.is_file()} == first


def test_a_run_that_did_not_end_well_is_not_done(main, tmp_path):
    assert main()[0] == 0
    (tmp_path / "out" / "runs" / "fslora-seed1" / "rounds.png").unlink()
    assert "fslora-seed1: goes on" in main()[1].err


def test_a_run_that_was_stopped_is_resumed(main, tmp_path):
    folder = tmp_path / "out" / "runs" / "fslora-seed1"
    assert main()[0] == 0
    (folder / "rounds.jsonl").write_text(json.dumps(compared.record(0)) + "\n")
    code, printed = main()
    assert code == 0 and "run 1 of 4, fslora-seed1: goes on" in printed.err
    lines = (tmp_path / "out" / "logs" / "fslora-seed1.log").read_text().splitlines()
    assert [line.split()[2:] for line in lines] == [[], ["--resume_from_checkpoint", "true"]]


def test_a_failed_run_is_told_with_its_log_and_the_others_go_on(main, tmp_path):
    code, printed = main(method_settings={"fslora": {"weight_decay": 0.5}})
    assert code.startswith("Expected every run to finish, found 2 failed (fslora-seed1, fslora-seed2)")
    assert printed.err.count("    no memory left") == 2 and "hetlora-seed2: done in" in printed.err
    summary = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert [len(variant["runs"]) for variant in summary["variants"]] == [0, 2]
    assert "fslora: no finished run of seed 1, 2." in summary["notes"]


def test_without_a_finished_run_there_is_no_report(main, tmp_path):
    code, _ = main(settings={"weight_decay": 0.5})
    assert code.startswith("Expected a finished run to report on") and not (tmp_path / "out" / "index.html").exists()


def test_a_folder_with_something_else_is_left_alone(main, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    code, _ = main()
    assert "to be empty or to hold this comparison, found something else" in code
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.txt"]


def test_another_comparison_is_refused_and_left_as_it_is(main, tmp_path):
    assert main()[0] == 0
    before = {path: path.read_bytes() for path in sorted((tmp_path / "out").rglob("*")) if path.is_file()}
    assert "found fslora-seed1 begun with something else: local_steps was 1 and is 2" in main("--local_steps", "2")[0]
    assert "num_rounds was 4 and is 5" in main(rounds=5)[0]
    assert "found another's runs (fslora-seed1, hetlora-seed1, fslora-seed2)" in main(methods=["flexlora"])[0]
    saved = tmp_path / "out" / "runs.json"
    saved.write_text(saved.read_text().replace('"rows": "', '"rows": "0'))
    assert "the training rows changed" in main()[0]
    saved.write_bytes(before[saved])
    assert {path: path.read_bytes() for path in sorted((tmp_path / "out").rglob("*")) if path.is_file()} == before
    assert main(settings={"logging_steps": 3})[0] == 0  # which changes no result


def test_two_at_once_are_refused(main, tmp_path):
    assert main()[0] == 0
    with open(tmp_path / "out" / LOCK_NAME, "w") as file:
        assert lock_file(file.fileno())
        assert "Expected no other run at work" in main()[0]


def test_a_run_that_a_killed_comparison_left_at_work_is_waited_for(plan, tmp_path):
    _, (run, *_) = plan()
    folder = Folder(tmp_path / "out")
    folder.log(run.name).parent.mkdir(parents=True)
    code = "import time; from tests.support import compared; from pathlib import Path; time.sleep(1.5); "
    code += f"compared.write_run(Path({str(folder.run(run.name))!r}), 4, {{4: (1.0, 0.5)}})"
    with open(folder.log(run.name), "a") as log:
        assert lock_file(log.fileno())
        orphan = subprocess.Popen([sys.executable, "-c", code], stdout=log, stderr=log, cwd=ROOT)
    looked = []
    launcher = Launcher(folder, Path("no such script"))
    assert launcher.finish(run, lambda: looked.append(time.monotonic())) and looked
    assert orphan.wait() == 0 and folder.log(run.name).read_text() == ""


def test_progress_is_told_in_runs_and_rounds(plan, tmp_path):
    _, runs = plan()
    folder, stream = Folder(tmp_path / "out"), io.StringIO()
    progress = Progress(runs, folder, stream)
    progress.show(runs[0])
    compared.write_run(folder.run(runs[0].name), 4, {4: (1.0, 0.5)})
    compared.write_run(folder.run(runs[1].name), 2, {2: (1.0, 0.5)})
    progress._started -= 60  # one run and a half in a minute: two and a half take 100 s
    assert progress.seconds_left() == pytest.approx(100, abs=1)
    progress.show(runs[1])  # too early for another line
    progress.every = 0
    progress.show(runs[1])
    assert stream.getvalue().splitlines() == [
        "run 1 of 4, fslora-seed1: round 0 of 4, time left unknown yet",
        "run 2 of 4, hetlora-seed1: round 2 of 4, about 2 min left in all",
    ]


def test_runs_start_under_accelerate_if_it_is_configured(plan, tmp_path):
    run = plan()[1][0]
    command = Launcher(Folder(tmp_path), Path("train.py"), "cpu.yaml").command(run)
    assert command[1:6] == ["-m", "accelerate.commands.launch", "--config_file", "cpu.yaml", "train.py"]
    assert Launcher(Folder(tmp_path), Path("train.py")).command(run)[1] == "train.py"


def test_the_script_tells_problems_without_a_traceback(main, tmp_path):
    code, _ = main(methodz=["fslora"], rounds=None)
    assert "did you mean methods?" in code and "found neither: keep one of the two." in code
    assert not (tmp_path / "out").exists()


def test_run_all_names_the_runs_that_failed(plan, tmp_path):
    _, runs = plan(settings={"weight_decay": 0.5}, seeds=[1])
    folder = Folder(tmp_path / "out")
    with folder.claimed(runs, splits_of(runs)):
        failed = run_all(runs, Launcher(folder, STAND_IN), Progress(runs, folder, io.StringIO()))
    assert failed == runs
