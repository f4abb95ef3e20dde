"""The benchmark scripts that no other test runs: what they compute by hand-made numbers, and a small run of each."""

import json
import os
import subprocess
import sys
from pathlib import Path

import allocator
import hub_push
import pytest
import server
import torch
import turns

from fslora_hf.methods import METHODS
from tests.support import tiny

ROOT = Path(__file__).resolve().parents[2]


def test_cases_take_turns_and_progress_is_told(capsys):
    readings = iter(range(6))
    runs = turns.take_turns(["a", "b"], 3, lambda case: (case, next(readings)), lambda case, one: f"{case}={one[1]}")
    assert runs == [[("a", 0), ("a", 2), ("a", 4)], [("b", 1), ("b", 3), ("b", 5)]]
    told = capsys.readouterr().err.splitlines()
    assert [line.split(",")[0] for line in told] == ["1/6 a=0", "2/6 b=1", "3/6 a=2", "4/6 b=3", "5/6 a=4", "6/6 b=5"]
    assert told[-1].endswith("0.0 minutes left")


def test_a_measurement_is_run_with_the_same_options_and_its_last_line_read(tmp_path, monkeypatch, capfd):
    script = tmp_path / "script.py"
    script.write_text("import json, os, sys\nprint('noise')\nprint(json.dumps([sys.argv[1:], os.environ['SEEN']]))\n"
                      "sys.exit('broken' if '--break' in sys.argv else 0)\n")  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["any.py", "--rank", "4"])
    found = turns.run_again(str(script), "--worker", "x", environment={"SEEN": "yes"})
    assert found == [["--rank", "4", "--worker", "x"], "yes"]
    with pytest.raises(RuntimeError, match="measurement with --break to end well, found exit code 1"):
        turns.run_again(str(script), "--break", environment={"SEEN": "yes"})
    assert "broken" in capfd.readouterr().err


def test_a_push_costs_its_snapshot_and_what_the_next_round_takes_more_than_its_neighbours():
    """Rounds of 10 s that grow by 1 s each; 2 s more beside a push, 0.5 s in the loop after rounds 2 and 4."""
    ends, now = [0.0], 0.0
    for number in range(1, 6):
        now += 9.0 + number + (2.0 if number in (3, 5) else 0.0) + (0.5 if number in (2, 4) else 0.0)
        ends.append(now)
    measured = {
        "readings": [[end, 2 * end] for end in ends],
        "snapshots": [[0, [9.0, 9.0]], [1, [0.0, 0.0]], [2, [0.5, 1.0]], [3, [0.0, 0.0]], [4, [0.5, 1.0]]],
    }
    for clock in (0, 1):
        row, factor = hub_push.summarise(measured, clock), 1 + clock
        assert row["rounds"] == pytest.approx([factor * one for one in (10, 11, 14, 13, 16)])
        assert row["snapshot"] == pytest.approx(0.5 * factor) and row["beside"] == pytest.approx(2.0 * factor)
        assert row["quiet_round"] == pytest.approx(12.0 * factor) and row["push"] == pytest.approx(2.5 * factor)
        assert row["growth"] == pytest.approx({1: 2.5 / 12, 2: 2.5 / 24, 10: 2.5 / 120})


@pytest.mark.slow
def test_hub_push_measures_a_run(tmp_path, monkeypatch, capsys):
    tiny.base_model(torch.float32).save_pretrained(tmp_path / "model")
    command = f"hub_push.py --model {tmp_path / 'model'} --cpu --rounds 5 --steps 1 --clients 1 --batch_size 1"
    command += f" --length 12 --completion 3 --rank 2 --stall 0.1 --output {tmp_path / 'out' / 'push.json'}"
    monkeypatch.setattr(sys, "argv", command.split())
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr(hub_push, "__file__", str(ROOT / "recipes/benchmarks/hub_push.py"))
    hub_push.main()
    assert "With a Hub that waits 0.1 s at each commit, training time changes by" in capsys.readouterr().out
    result = json.loads((tmp_path / "out" / "push.json").read_text())
    seconds = result["results"]["seconds"]
    assert len(seconds["rounds"]) == 5 and min(seconds["rounds"]) > 0 and seconds["snapshot"] > 0
    assert result["settings"]["model"] == "model" and "torch" in result["versions"]


def test_too_few_rounds_are_told(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["hub_push.py", "--rounds", "4"])
    with pytest.raises(SystemExit):
        hub_push.main()
    assert "Expected at least 5 rounds" in capsys.readouterr().err


def test_allocators_take_turns_on_the_same_steps(tmp_path, monkeypatch, capsys):
    """In this process, which has its allocator already; what it holds cannot be told apart."""
    tiny.base_model(torch.float32).save_pretrained(tmp_path / "model")
    command = f"allocator.py --model {tmp_path / 'model'} --blocks 1 2 --steps 1 --repeats 1 --batch_size 1"
    command += f" --length 12 --completion 3 --rank 2 --output {tmp_path / 'out' / 'allocator.json'}"
    monkeypatch.setattr(sys, "argv", command.split())
    environments = []

    def run_here(script, *arguments, environment):
        environments.append(environment)
        options = allocator.parse()
        block = int(arguments[1])
        return allocator.time_steps(options, block, {"clients_per_round": block})

    monkeypatch.setattr(allocator, "run_again", run_here)
    allocator.main()
    assert [bool(environment) for environment in environments] == [True, False] * 2
    result = json.loads((tmp_path / "out" / "allocator.json").read_text())
    assert [row["clients"] for row in result["results"]] == [1, 2] and "cpu" not in result["settings"]
    for row in result["results"]:
        speeds = [row[name]["tokens_per_second"] for name in allocator.ALLOCATORS]
        assert row["speed"] == pytest.approx(speeds[1] / speeds[0]) and min(speeds) > 0
    assert "4/4 2 clients, kept" in capsys.readouterr().err


def test_the_default_allocator_is_one_that_the_trainer_leaves_alone():
    code = "from fslora_hf.common.host_memory import keep_freed_memory; print(keep_freed_memory())"
    for name, kept in (("default", "False"), ("kept", "True")):
        environment = {**os.environ, "PYTHONPATH": str(ROOT), **allocator.ALLOCATORS[name]}
        done = subprocess.run([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True)
        assert done.stdout.split() == [kept]


def test_server_measures_every_method(tmp_path, monkeypatch, capsys):
    """In this process, on shapes of a few numbers; how much memory that takes cannot be seen."""
    output = tmp_path / "out" / "server.json"
    command = f"server.py --rank 4 --clients 2 --client_ranks 2 4 --repeats 1 --output {output}"
    monkeypatch.setattr(sys, "argv", command.split())
    monkeypatch.setattr(server, "SHAPES", {"square": (8, 8), "wide": (12, 6)})
    options = server.parse()
    monkeypatch.setattr(server, "run_worker", lambda case: server.work(*case, options))
    server.main()
    rows = json.loads(output.read_text())["results"]
    measured = {(row["method"], row["client_rank"]) for row in rows}
    equal = {name for name, method in METHODS.items() if method.full_rank_only}
    assert measured == {(name, rank) for name in METHODS for rank in ([4] if name in equal else [2, 4])}
    assert all(row["seconds"] > 0 and row["bytes"] >= 0 for row in rows)
    assert "flora_residual" in capsys.readouterr().out
