"""The benchmark of clients a step, and what it shares with throughput's: hand-made numbers, and a small run."""

import json
import sys

import blocks
import matrix_rate
import pytest
import step_rows
import throughput
import torch
from peft import get_peft_model

from tests.support import tiny

SMALL = "--cpu --blocks 1 3 --batch_size 1 --length 12 --completion 3 --rank 4 --steps 1 --repeats 1"


def parse(monkeypatch, arguments: str):
    monkeypatch.setattr(sys, "argv", ["blocks.py", *arguments.split()])
    return blocks.parse()


def run(tokens: int, seconds: list[float], peak: float) -> dict:
    return {
        "tokens": [tokens] * len(seconds),
        "seconds": seconds,
        "peak_bytes": peak,
        "flops_per_token": 50.0,
        "matrix_rate": 1e4,
    }


def test_figures_are_medians_of_steps_and_the_largest_peak():
    """100, 50 and 25 tokens a second, where the matrix rate allows 200; 50 and 25 have the median 37.5."""
    row = throughput.figures([run(100, [2.0, 4.0], 3e9), run(100, [1.0], 5e9)])
    assert row["tokens_per_second"] == 50.0 and row["slowest_fastest"] == [25.0, 100.0]
    assert row["peak_gigabytes"] == 5.0 and row["flops_per_token"] == 50.0
    assert row["part_of_matrix_rate"] == pytest.approx((37.5 / 200 + 100 / 200) / 2)


def test_blocks_are_held_against_the_smallest_and_against_sft():
    measured = {
        ("full", 4): [run(400, [2.0], 3e9)],
        ("full", 1): [run(100, [1.0], 2e9)],
        ("sft", 4): [run(400, [4.0], 6e9)],
        ("sft", 1): [run(100, [2.0], 2e9)],
    }
    results = blocks.summarise(measured)
    assert [row["clients"] for row in results["full"]] == [4, 1]
    four, one = results["full"]
    assert (four["speed_against_smallest"], four["memory_against_smallest"]) == (2.0, 1.5)
    assert (four["speed_against_sft"], four["memory_against_sft"]) == (2.0, 0.5)
    assert (one["speed_against_smallest"], one["speed_against_sft"]) == (1.0, 2.0)
    assert results["sft"][0]["speed_against_smallest"] == 2.0
    assert "speed_against_sft" not in blocks.summarise({("mixed", 2): [run(1, [1.0], 1.0)]})["mixed"][0]


def test_throughput_is_held_against_sft_with_the_same_rows():
    seconds = {"sft": 4.0, "one": 2.0, "sft_block": 2.0, "block": 1.0}
    measured = {name: [run(400 if "block" in name else 100, [one], 1e9)] for name, one in seconds.items()}
    rows = throughput.summarise(measured)
    assert {name: row["against_sft"] for name, row in rows.items()} == {
        "sft": 1,
        "one": 2,
        "sft_block": 8,
        "block": 16,
    }
    same = {name: row["against_sft_same_batch"] for name, row in rows.items()}
    assert same == {"sft": 1, "one": 2, "sft_block": 1, "block": 2}


@pytest.mark.parametrize("clients, highest", [(1, 16), (2, 16), (16, 16), (32, 16), (5, 1)])
def test_mixed_ranks_are_spread_from_the_highest_to_one(clients, highest):
    ranks = blocks.spread_ranks(clients, highest)
    assert len(ranks) == clients and ranks[0] == highest and ranks == sorted(ranks, reverse=True)
    assert min(ranks) == (1 if clients > 1 else highest)
    if clients == highest:
        assert sorted(ranks) == list(range(1, highest + 1))


def test_operations_of_a_token_are_those_of_its_matrices():
    """Two layers of q, o [16, 16], k, v [8, 16], gate, up [24, 16] and down [16, 24]; a head of 32 words; adapters at
    q [16 + 16], v [16 + 8] and down [24 + 16]."""
    model = get_peft_model(tiny.base_model(torch.float32), tiny.lora_config())
    weights = 2 * (2 * 16 * 16 + 2 * 8 * 16 + 3 * 24 * 16)
    pair = 2 * 3.5 * ((16 + 16) + (16 + 8) + (24 + 16))
    operations = matrix_rate.flops_per_token(model, rank=3.5, scored=0.25)
    assert operations == 4 * weights + 4 * 32 * 16 * 0.25 + 6 * pair


def test_the_matrix_rate_is_two_operations_a_weight_and_row(monkeypatch):
    """A clock by which every product takes half a second."""
    readings = iter(range(100))
    monkeypatch.setattr(matrix_rate.time, "perf_counter", lambda: next(readings) / 2)
    assert matrix_rate.matrix_rate(torch.float32, "cpu", size=8, repeats=3) == 2 * 8**3 / 0.5


def test_blocks_measures_every_law(tmp_path, monkeypatch, capsys):
    """In this process; how much memory that takes cannot be seen."""
    tiny.base_model(torch.float32).save_pretrained(tmp_path / "model")
    output = tmp_path / "out" / "blocks.json"
    options = parse(monkeypatch, f"{SMALL} --with_sft --model {tmp_path / 'model'} --output {output}")
    rate, seen = throughput.matrix_rate, []
    monkeypatch.setattr(throughput, "matrix_rate", lambda dtype, device: rate(dtype, device, size=64))
    monkeypatch.setattr(throughput, "flops_per_token", lambda *given: seen.append(given[1:]) or 100.0)
    monkeypatch.setattr(blocks, "run_worker", lambda case: blocks.work(options, *case))
    blocks.main()
    result = json.loads(output.read_text())
    assert set(result["results"]) == {"full", "mixed", "sft"} and "clients" not in result["settings"]
    for rows in result["results"].values():
        assert [row["clients"] for row in rows] == [1, 3]
        assert all(row["tokens_per_second"] > 0 and row["part_of_matrix_rate"] > 0 for row in rows)
    # In turn: full, mixed and SFTTrainer at 1 client, whose mixed rank the plan draws, and the same at all 3.
    assert [seen[number] for number in (0, 2, 3, 4, 5)] == [
        (4.0, 0.25),
        (4.0, 0.25),
        (4.0, 0.25),
        (8 / 3, 0.25),
        (4.0, 0.25),
    ]
    assert "ranks from 1 to it" in capsys.readouterr().out and output.with_suffix(".png").stat().st_size > 5_000


@pytest.mark.parametrize(
    "arguments, told",
    [
        ("--blocks 0 4", "Expected --blocks from 1 on, found 0 4: raise it."),
        ("--blocks 4 4", "Expected every number of --blocks once, found 4 4: leave out what is double"),
        ("--steps 0", "Expected --steps from 1 on, found 0: raise it."),
        ("--length 8", "Expected --completion below --length 8, found 8: lower it."),
    ],
)
def test_options_that_cannot_be_measured_with_are_told(monkeypatch, capsys, arguments, told):
    with pytest.raises(SystemExit):
        parse(monkeypatch, arguments)
    assert told in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("federated", [None, {"clients_per_round": 2}], ids=["SFTTrainer", "federated"])
def test_steps_on_rows_of_their_own_lengths_count_their_tokens(tmp_path, monkeypatch, federated):
    """One test for both: as many tokens as the rows of each step have, padding left out."""
    tiny.base_model(torch.float32).save_pretrained(tmp_path / "model")
    words = tiny.tokenizer()
    words.save_pretrained(tmp_path / "model")
    with open(tmp_path / "rows.jsonl", "w") as file:
        for number in range(40):
            row = {"prompt": "w1 " * (1 + number % 7), "completion": "w2 w3"}
            file.write(json.dumps(row) + "\n")
    options = parse(monkeypatch, f"{SMALL} --model {tmp_path / 'model'} --rows {tmp_path / 'rows.jsonl'} --steps 3")
    monkeypatch.setattr(throughput, "matrix_rate", lambda dtype, device: 1.0)
    batches, collate = [], step_rows.CountingCollator.__call__

    def watched(self, rows):
        batches.append(sum(len(row["input_ids"]) for row in rows))
        return collate(self, rows)

    monkeypatch.setattr(step_rows.CountingCollator, "__call__", watched)
    found = throughput.time_steps(options, 2, federated)
    assert len(found["seconds"]) == 3 and found["tokens"] == batches[2:5] and len(set(batches)) > 1
