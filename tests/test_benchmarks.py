"""The benchmark scripts that no other test runs: what they compute by hand-made numbers, and a small run of each."""

import json
import sys
from pathlib import Path

import hub_push
import pytest
import server

from fslora_hf.methods import METHODS
from tests import tiny

ROOT = Path(__file__).resolve().parents[1]


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
    import torch

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


def test_server_measures_every_method(tmp_path, monkeypatch, capsys):
    """In this process, on shapes of a few numbers; how much memory that takes cannot be seen."""
    output = tmp_path / "out" / "server.json"
    command = f"server.py --rank 4 --clients 2 --client_ranks 2 4 --repeats 1 --output {output}"
    monkeypatch.setattr(sys, "argv", command.split())
    monkeypatch.setattr(server, "SHAPES", {"square": (8, 8), "wide": (12, 6)})
    options = server.parse()
    monkeypatch.setattr(server, "run_worker", lambda name, rank: server.work(name, rank, options))
    server.main()
    rows = json.loads(output.read_text())["results"]
    measured = {(row["method"], row["client_rank"]) for row in rows}
    equal = {name for name, method in METHODS.items() if method.full_rank_only}
    assert measured == {(name, rank) for name in METHODS for rank in ([4] if name in equal else [2, 4])}
    assert all(row["seconds"] > 0 and row["bytes"] >= 0 for row in rows)
    assert "flora_residual" in capsys.readouterr().out
