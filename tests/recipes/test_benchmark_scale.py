"""The scale benchmark: what it computes by hand-made numbers, and small runs of its measurements."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import scale
import scale_parts

from fslora_hf.storage.checkpoint import read_state
from fslora_hf.storage.ledger import read_records

ROOT = Path(__file__).resolve().parents[2]
SMALL = "--clients 5 20 --cohort 10 --cohorts 1 4 --ranks 2 4 --rank_cohort 3 --rank 4 --layer small --plans 2"
SMALL += " --late_round 4 --startup_clients 300 --resume_clients 12 --resume_cohort 6 --repeats 1"


def parse(monkeypatch, arguments: str):
    monkeypatch.setattr(sys, "argv", ["scale.py", *arguments.split()])
    return scale.parse()


def test_figures_are_held_to_their_targets():
    results = {
        "clients": [
            {"clients": 1_000_000, "cohort": 100, "later_plan_seconds": 0.02, "all_bytes": 300e6},
            {"clients": 10, "cohort": 10, "later_plan_seconds": 9.0, "all_bytes": 1.0},
        ],
        "startup": [{"construction_seconds": 1.5}, {"construction_seconds": 3.25}],
        "resume": [{"round": 1, "resume_seconds": 0.5}, {"round": 10_000, "resume_seconds": 1.25}],
    }
    held = scale.judge(results)
    assert [target["found"] for target in held] == [0.02, 300e6, 1.75, 0.75]
    assert [target["bound"] for target in held] == [0.05, 200e6, 2.0, 0.5]
    assert [target["kept"] for target in held] == [True, False, True, False]
    assert "a round of 100 of 1,000,000 clients" in held[0]["what"]
    assert "round 10,000 beyond round 1's" in held[3]["what"]
    assert scale.judge({"ranks": []}) == []


def test_measurements_take_turns_and_their_medians_are_taken(monkeypatch):
    options, asked = parse(monkeypatch, SMALL + " --repeats 3 --sweeps clients"), []
    readings = {5: [3.0, 1.0, 2.0], 20: [30.0, 50.0, 40.0]}

    def run_worker(case):
        _, _, arguments = case
        asked.append(arguments["clients"])
        return {"plan_seconds": readings[arguments["clients"]].pop(0)}

    monkeypatch.setattr(scale, "run_worker", run_worker)
    rows = scale.measure(options)["clients"]
    assert asked == [5, 20, 5, 20, 5, 20]
    assert [(row["clients"], row["cohort"], row["plan_seconds"]) for row in rows] == [(5, 5, 2.0), (20, 10, 40.0)]


def test_a_timer_adds_seconds_of_one_name_and_sees_what_is_held():
    timer = scale_parts.Timer()
    with timer.memory("all"):
        for _ in range(2):
            with timer.time("made"):
                made = np.ones(8_000_000)
                del made
    readings = timer.readings()
    assert set(readings) == {"made_seconds", "all_bytes"} and readings["made_seconds"] > 0
    assert 60e6 < readings["all_bytes"] < 100e6


def test_rows_belong_to_clients_in_turn():
    rows = scale_parts.make_rows(7, 3)
    assert [row["client_id"] for row in rows] == [0, 1, 2, 0, 1, 2, 0]
    assert all(len(row["input_ids"]) == scale_parts.TOKENS and row["labels"] == row["input_ids"] for row in rows)


def test_a_later_checkpoint_is_one_that_the_library_reads(monkeypatch, tmp_path):
    """The run of `resume` itself; its folder is looked at where the checkpoint is written anew."""
    options, seen = parse(monkeypatch, SMALL), []
    renumber = scale_parts.renumber

    def look(checkpoint, round):
        renumber(checkpoint, round)
        (later,) = checkpoint.parent.glob("checkpoint-*")
        state = json.loads((later / "trainer_state.json").read_text())
        logged = {entry["step"] for entry in state["log_history"]}
        seen.append((later.name, read_state(later)["round"], state["global_step"], logged))
        seen.append([record["round"] for record in read_records(checkpoint.parent / "rounds.jsonl")])

    monkeypatch.setattr(scale_parts, "renumber", look)
    readings = scale_parts.resume(options, round=4)
    assert seen == [("checkpoint-4", 4, 4, {1, 2, 3, 4}), [0, 1, 2, 3]]
    assert readings["resume_seconds"] > 0 and readings["ledger_bytes"] > 4 * 100


def test_scale_measures_every_sweep(tmp_path, monkeypatch, capsys):
    """In this process; how much memory that takes cannot be seen."""
    output = tmp_path / "out" / "scale.json"
    options = parse(monkeypatch, f"{SMALL} --output {output}")
    monkeypatch.setattr(scale, "run_worker", lambda case: scale.KINDS[case[1]](options, **case[2]))
    scale.main()
    result = json.loads(output.read_text())
    sweeps = result["results"]
    assert [(row["clients"], row["cohort"]) for row in sweeps["clients"]] == [(5, 5), (20, 10)]
    measured = [(row["kind"], row["cohort"]) for row in sweeps["cohorts"]]
    assert measured == [(kind, cohort) for kind in ("planning", "hand_over") for cohort in (1, 4)]
    assert [(row["low"], row["high"], row["cohort"]) for row in sweeps["ranks"]] == [(2, 2, 3), (4, 4, 3)]
    assert [row["trainer"] for row in sweeps["startup"]] == ["sft", "federated"]
    assert [row["round"] for row in sweeps["resume"]] == [1, 4]
    readings = [reading for rows in sweeps.values() for row in rows for reading in row.items()]
    assert all(value > 0 for name, value in readings if name.endswith("_seconds"))
    assert all(value >= 0 for name, value in readings if name.endswith("_bytes"))
    assert len(result["targets"]) == 4 and "torch" in result["versions"]
    printed = capsys.readouterr().out
    assert "a round of 10 of 20 clients" in printed and "cohorts: hand_over (ms, MB)" in printed
    assert output.with_suffix(".png").stat().st_size > 5_000


@pytest.mark.slow
def test_a_measurement_is_a_process_of_its_own(tmp_path):
    output = tmp_path / "scale.json"
    command = [sys.executable, str(ROOT / "recipes/benchmarks/scale.py"), *SMALL.split(), "--sweeps", "clients"]
    command += ["--clients", "20", "--output", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr[-3000:]
    (row,) = json.loads(output.read_text())["results"]["clients"]
    assert row["clients"] == 20 and row["sketches_seconds"] > 0


@pytest.mark.parametrize(
    "arguments, told",
    [
        ("--cohorts 0 4", "Expected --cohorts from 1 on, found 0 4: raise it."),
        ("--repeats 0", "Expected --repeats from 1 on, found 0: raise it."),
        ("--rank 8 --ranks 4 16", "Expected --ranks of at most the global --rank 8, found 16: lower them"),
        ("--clients 10 50", "at most the most --clients, 50, found 1000: lower them, or add more clients."),
        ("--late_round 1", "Expected --late_round after round 1, found 1: raise it."),
    ],
)
def test_options_that_cannot_be_measured_with_are_told(monkeypatch, capsys, arguments, told):
    with pytest.raises(SystemExit):
        parse(monkeypatch, arguments)
    assert told in " ".join(capsys.readouterr().err.split())
