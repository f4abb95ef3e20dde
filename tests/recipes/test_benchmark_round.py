"""The benchmark of whole rounds: that all ways train the same thing, what it computes, and a small run."""

import dataclasses
import json
import sys
from types import SimpleNamespace

import pytest
import round as benchmark  # recipes/benchmarks/round.py
import round_setup
import round_ways
import throughput
import torch
from peft import get_peft_model
from peft.tuners.lora import LoraLayer
from step_rows import real_rows

from fslora_hf import FederatedSketchTrainer
from fslora_hf.models.scored_head import add_scored_head
from fslora_hf.rounds.run import FederatedRun
from tests.support import reference, tiny

pytest_plugins = ("tests.support.forked",)

RANKS = [2, 6, 1]


@pytest.fixture
def setup(monkeypatch) -> round_setup.Setup:
    """Two rounds of three clients in float64, from an adapter whose B is not zero, with a clipping that bites."""
    # TRL's own head computes in float32 and would hide differences up to 1e-7.
    monkeypatch.setattr("trl.trainer.sft_trainer.add_fused_lm_head", lambda model, **_: add_scored_head(model))
    lora = tiny.lora_config(zero_b=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        start = round_setup.read_adapter(get_peft_model(tiny.base_model(), lora))
    return round_setup.Setup(
        load=tiny.base_model,
        base=None,
        lora=lora,
        start=start,
        rows=tiny.tokenised({41: 25, 3: 1, 10**12: 9}),
        tokenizer=tiny.tokenizer(),
        ranks=RANKS,
        rounds=2,
        local_steps=2,
        batch_size=2,
        use_cpu=True,
        learning_rate=1e-2,
        max_grad_norm=0.3,
    )


def run(way: str, setup: round_setup.Setup, block: int = len(RANKS)) -> round_setup.Adapter:
    """The adapter that a way trains; what it holds and reads on the way is counted."""
    base, loads, clock = setup.load(), [], round_setup.Clock()
    setup = dataclasses.replace(
        setup,
        base=None if way == "reload" else base,
        load=lambda: loads.append(way) or tiny.base_model(),
    )
    adapter = benchmark.run_way(way, setup, clock, block)
    assert len(clock.rounds) == setup.rounds
    assert len(loads) == (setup.rounds * len(RANKS) if way == "reload" else 0)
    if way == "swap":
        assert not any(isinstance(module, LoraLayer) for module in base.modules())
    return adapter


@pytest.mark.parametrize("optim, learning_rate", [("adamw_torch_fused", 1e-2), ("sgd", 0.5)])
def test_all_ways_train_the_same(setup, optim, learning_rate):
    setup = dataclasses.replace(setup, optim=optim, learning_rate=learning_rate)
    one = run("ours_one", setup)
    assert reference.max_difference(one, setup.start) > 1e-3
    others = {way: run(way, setup) for way in benchmark.WAYS if way != "ours_one"}
    others["a ragged block"] = run("ours_block", setup, block=2)
    gaps = {way: reference.max_difference(one, adapter) for way, adapter in others.items()}
    if optim != "sgd":
        assert gaps.pop("deep_copy") > 1e-4  # its B moves at k / r of the learning rate
    assert max(gaps.values()) < 1e-9, gaps


def test_masks_are_as_large_as_the_model(setup):
    model = round_setup.with_adapter(tiny.base_model(), setup.lora, setup.start)
    client = setup.plan(0).clients[0]
    masks = round_ways._masks(setup, model, client)
    assert len(masks) == 2
    for one in masks:
        assert {n: mask.shape for n, mask in one.items()} == {n: p.shape for n, p in model.named_parameters()}


def test_the_parts_of_a_round_are_what_the_trainer_spends_in_them(setup, monkeypatch):
    """Each call takes 1, 2, 4, ... seconds of a clock that stands still otherwise; 2 blocks, 2 local steps."""
    now = [0.0]

    def takes(seconds: float, name: str) -> None:
        owner = FederatedSketchTrainer if name == "training_step" else FederatedRun
        original = getattr(owner, name)

        def slow(self, *args, **kwargs):
            now[0] += seconds
            return original(self, *args, **kwargs)

        monkeypatch.setattr(owner, name, slow)

    monkeypatch.setattr(round_setup, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    for power, name in enumerate(("begin_round", "hand_over", "training_step", "collect", "aggregate")):
        takes(2**power, name)
    clock = round_setup.Clock()
    benchmark.run_way("ours_block", dataclasses.replace(setup, base=setup.load()), clock, 2)
    assert clock.rounds == [{"hand_over": 1 + 2 * 2, "aggregation": 2 * 8 + 16, "seconds": 5 + 2 * 2 * 4 + 32}] * 2


def test_random_weights_are_read_back_as_they_were(tmp_path, monkeypatch):
    """A model of random weights is saved once, so that reading it anew costs no drawing."""
    shape = dict(vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
    monkeypatch.setitem(throughput.SHAPES, "tiny", shape)
    monkeypatch.setattr(sys, "argv", "round.py --model tiny --cpu --length 12 --rank 4 --worker reload".split())
    options = benchmark.parse()
    setup = benchmark.make_setup(options, torch.device("cpu"), str(tmp_path))
    drawn, read = throughput.load_model(options).state_dict(), setup.load().state_dict()
    assert setup.base is None and drawn.keys() == read.keys()
    assert all(torch.equal(drawn[name], read[name]) for name in drawn)


@pytest.mark.parametrize("scored", ["completion", "all"])
def test_rows_with_lengths_of_their_own_become_tokens(tmp_path, monkeypatch, scored):
    tiny.base_model(torch.float32).save_pretrained(tmp_path)
    tokenizer = tiny.tokenizer()
    tokenizer.save_pretrained(tmp_path)
    command = f"round.py --model {tmp_path} --cpu --rows miniature --rank 4 --loss {scored} --worker swap"
    monkeypatch.setattr(sys, "argv", command.split())
    options = benchmark.parse()
    setup = benchmark.make_setup(options, torch.device("cpu"), "unused")
    texts, eos = real_rows(options), tokenizer.eos_token_id
    assert len({len(row) for row in setup.rows["input_ids"]}) > 1
    for row, text in zip(setup.rows, texts, strict=True):
        prompt, completion = (tokenizer(text[part])["input_ids"] for part in ("prompt", "completion"))
        assert row["input_ids"] == [*prompt, *completion, eos]
        assert row["labels"] == [*([-100] * len(prompt) if scored == "completion" else prompt), *completion, eos]
        assert row["client_id"] == text["client_id"]


def test_clock_waits_for_the_device():
    """Before every reading: the beginning, both ends of a part, and the end of a round."""
    waits = []
    clock = round_setup.Clock(lambda: waits.append(len(clock.rounds) if waits else None))
    with clock.part("hand_over"):
        assert len(waits) == 2
    clock.end_round()
    assert len(waits) == 4


def measured(seconds: list[float], before: float, peak: float, share: float = 0.0) -> dict:
    parts = [{"seconds": s, **({"hand_over": s * share / 4, "aggregation": s * share * 3 / 4} if share else {})}
             for s in seconds]  # fmt: skip
    return {"rounds": parts, "bytes_before": before * 1e9, "peak_bytes": peak * 1e9}


def test_medians_largest_memory_and_ratios():
    rows = benchmark.summarise(
        {
            "ours_one": [measured([10.0, 14.0], 1.0, 2.0, share=0.01), measured([12.0], 1.5, 2.2, share=0.04)],
            "ours_block": [measured([6.0], 1.0, 4.0, share=0.5)],
            "swap": [measured([24.0], 1.0, 1.1), measured([36.0], 0.25, 1.0), measured([20.0], 1.0, 1.0)],
        }
    )
    one, block, swap = rows["ours_one"], rows["ours_block"], rows["swap"]
    assert (one["seconds"], one["fastest_slowest"]) == (12.0, [10.0, 14.0])
    assert one["share_beside_local_steps"] == pytest.approx(0.01)
    assert block["parts"] == pytest.approx({"hand_over": 0.75, "local_steps": 3.0, "aggregation": 2.25})
    assert swap["seconds"] == 24.0 and "parts" not in swap
    assert swap["peak_gigabytes"] == pytest.approx(1.1) and swap["gigabytes_beyond"] == pytest.approx(0.75)
    assert swap["seconds_against_ours_one"] == 2.0 and swap["seconds_against_ours_block"] == 4.0
    assert swap["memory_against_ours_one"] == pytest.approx(0.5)
    assert swap["memory_against_ours_block"] == pytest.approx(1.1 / 4)


@pytest.mark.parametrize("clients, rank", [(8, 16), (8, 64), (5, 16), (2, 4), (1, 8)])
def test_default_ranks_have_a_quarter_for_a_mean(clients, rank):
    ranks = benchmark.mixed_ranks(clients, rank)
    assert len(ranks) == clients and sum(ranks) == clients * rank / 4
    assert 1 <= min(ranks) and max(ranks) <= max(1, rank // 2 - 1)
    if (clients, rank) == (8, 16):
        assert ranks == [1, 7, 2, 6, 3, 5, 4, 4]


@pytest.mark.parametrize(
    "options, message",
    [
        ("--rank 6", "Expected a rank that 4 divides, found 6"),
        ("--client_ranks 1 2", r"Expected 8 client ranks from 1 to 16"),
        ("--clients 2 --client_ranks 1 17", r"found [1, 17]"),
    ],
)
def test_wrong_ranks_are_told(monkeypatch, capsys, options, message):
    monkeypatch.setattr(sys, "argv", ["round.py", *options.split()])
    with pytest.raises(SystemExit):
        benchmark.main()
    assert message in " ".join(capsys.readouterr().err.split())


@pytest.mark.slow
def test_a_small_run_measures_every_way(tmp_path, monkeypatch, forked_measurements, capfd):
    tiny.base_model(torch.float32).save_pretrained(tmp_path / "model")
    output = tmp_path / "out" / "round.json"
    command = f"round.py --model {tmp_path / 'model'} --cpu --clients 2 --steps 1 --repeats 1 --rank 4 --length 12"
    command += f" --completion 3 --loss all --client_ranks 1 4 --output {output}"
    monkeypatch.setattr(sys, "argv", command.split())
    benchmark.main()
    printed = capfd.readouterr()
    assert "5/5 deep_copy" in printed.err and printed.out.count("% of the round.") == 2
    result = json.loads(output.read_text())
    assert result["settings"]["model"] == "model" and result["settings"]["client_ranks"] == [1, 4]
    assert set(result["results"]) == set(benchmark.WAYS) and "torch" in result["versions"]
    for row in result["results"].values():
        assert row["seconds"] > 0 and 0 < row["gigabytes_beyond"] < row["peak_gigabytes"]
    assert all(0 < result["results"][way]["share_beside_local_steps"] < 1 for way in benchmark.OURS)
    assert output.with_suffix(".png").stat().st_size > 5_000
