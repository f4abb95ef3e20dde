"""`per_device_train_clients: auto`: the largest block that fits is found, recorded and kept, and changes no result."""

import json
import math
from pathlib import Path

import pytest
import torch

from fslora_hf.common import host_memory
from fslora_hf.rounds.layout import Layout
from fslora_hf.trainers import block_size, local_steps
from fslora_hf.trainers.block_size import HostMeter, fit_block, largest_block, longest_rows, meter_of
from tests.support import reference, tiny
from tests.support.worker_train import build, ledger

ARGS = {"optim": "adamw_torch", "num_rounds": 2, "local_steps": 2, "client_ranks": [1, 2, 4, 6, 3], "save_rounds": 1}
ARGS["max_grad_norm"] = 0.05


class FakeMeter:
    """A step of n clients takes 100 + 10 n bytes; the steps are taken, and noted."""

    def __init__(self, room: float):
        self.room, self.limit, self.sizes = room, math.inf, []

    def peak(self, step) -> float:
        clients, _ = step.args
        self.sizes.append(clients)
        step()
        return 100.0 + 10 * clients


def meter_with(monkeypatch, room: float) -> FakeMeter:
    meter = FakeMeter(room)
    monkeypatch.setattr(block_size, "meter_of", lambda device: meter)
    return meter


# ---- The search ----

LAWS = {
    "a fixed part and one for each client": lambda n: 100 + 7 * n,
    "a part for each client": lambda n: 7 * n,
    "nearly all fixed": lambda n: 300 + n,
    "growing faster": lambda n: 50 + n**1.5,
}


@pytest.mark.parametrize("law", LAWS.values(), ids=LAWS)
@pytest.mark.parametrize("room", [0, 120, 310, 350, 10_000])
@pytest.mark.parametrize("most", [1, 2, 5, 33, 1000])
@pytest.mark.parametrize("refuses", [False, True], ids=["told", "out of memory"])
def test_the_largest_block_is_found(law, room, most, refuses):
    tried = []

    def peak(clients):
        tried.append(clients)
        return None if refuses and law(clients) > room else law(clients)

    expected = max([n for n in range(1, most + 1) if law(n) <= room], default=0)
    assert largest_block(peak, room, most) == expected
    assert len(tried) == len(set(tried)) <= 25 and max(tried) <= most


@pytest.mark.parametrize("fixed", [0, 40, 1000, 2400])
def test_no_step_is_tried_that_could_take_more_than_there_is(fixed):
    """On a machine's own memory it would end the process."""
    tried = []
    found = largest_block(lambda n: tried.append(n) or fixed + 50 * n, 2510, 100, limit=3000)
    assert max(fixed + 50 * n for n in tried) <= 3000 and len(tried) <= 4
    expected = (2510 - fixed) // 50
    assert found == (expected if fixed < 2400 else 1)  # where two might have taken 4,900, one it is
    assert largest_block(lambda n: fixed + 50 * n, 2510, 100) == expected


@pytest.mark.parametrize(
    "cohort, processes, largest, even", [(10, 1, 4, 4), (10, 1, 7, 5), (10, 2, 4, 3), (5, 2, 9, 3)]
)
def test_no_block_is_larger_than_its_waves_need(cohort, processes, largest, even):
    assert Layout(cohort, 1, largest, processes).even_block == even


# ---- The step that is measured ----


@pytest.mark.parametrize("method", ["fslora", "ffa_lora", "flora"])
def test_trying_leaves_no_trace(tmp_path, method):
    args = {**ARGS, "method": method, "activation_checkpointing": True}
    if method == "ffa_lora":
        args["client_ranks"] = None
    made = build(tmp_path, args, {"dropout": 0.1})
    before = {name: (value.clone(), value.requires_grad) for name, value in made.model.named_parameters()}
    drawn = torch.random.get_rng_state()
    meter = FakeMeter(130)
    assert fit_block(made.largest_step, meter) == 3 and meter.sizes[0] == 1 and max(meter.sizes) == 3
    after = dict(made.model.named_parameters())
    assert after.keys() == before.keys() and torch.equal(torch.random.get_rng_state(), drawn)
    for name, (value, trained) in before.items():
        assert torch.equal(value, after[name]) and trained == after[name].requires_grad and after[name].grad is None


def test_the_longest_rows_are_tried():
    rows = tiny.tokenised()
    lengths = sorted(map(len, rows["input_ids"]), reverse=True)
    found = longest_rows(rows, ("input_ids", "labels"), len(rows) + 2)
    assert [len(row["input_ids"]) for row in found] == [*lengths, *lengths[:2]]
    assert set(found[0]) == {"input_ids", "labels"} and lengths[0] > lengths[-1]


def test_what_a_step_holds_is_measured():
    meter = meter_of(torch.device("cpu"))
    assert isinstance(meter, HostMeter) and meter.room > 2e8
    small, large = (meter.peak(lambda n=n: torch.ones(n * 2**18)) for n in (40, 160))  # MiB
    assert 100e6 < large - small < 160e6 and small < 80e6
    again = meter.peak(lambda: None)
    assert again < large - 100e6  # a peak is the step's own, not an earlier one's


def test_a_control_groups_limit_counts(monkeypatch, tmp_path):
    everywhere = host_memory.free_bytes()
    monkeypatch.setattr(host_memory, "_CONTROL_GROUPS", ((str(tmp_path), "limit", "used", "inactive_file"),))
    (tmp_path / "limit").write_text("max\n")
    (tmp_path / "used").write_text("900\n")
    (tmp_path / "memory.stat").write_text("anon 5\ninactive_file 300\n")
    assert host_memory.free_bytes() == pytest.approx(everywhere, rel=0.2)
    (tmp_path / "limit").write_text("1000\n")
    assert host_memory.free_bytes() == 400
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert HostMeter().room == pytest.approx(80)


def test_a_device_that_cannot_be_measured_is_told(monkeypatch):
    with pytest.raises(ValueError, match="^Expected a CUDA device, or Linux, .* found mps on .*set .* to a number"):
        meter_of(torch.device("mps"))
    monkeypatch.setattr(host_memory, "_STATUS", Path("/nowhere"))
    with pytest.raises(ValueError, match="found cpu on"):
        meter_of(torch.device("cpu"))


# ---- Whole runs ----


def test_auto_gives_the_run_of_the_block_it_finds(tmp_path, monkeypatch):
    """Two of five clients fit, so blocks of two; bit for bit what the number 2 gives."""
    meter = meter_with(monkeypatch, 125)
    runs = {}
    for block in ("auto", 2):
        made = build(tmp_path / str(block), {**ARGS, "per_device_train_clients": block}, {"dropout": 0.1})
        assert made.round_plan(1).clients and made.args.per_device_train_clients == block
        made.train()
        runs[block] = reference.read_adapter(made.model)
        assert made.layout.block_size == 2 and made.state.global_step == 2 * 3 * 2
        written = json.loads((tmp_path / str(block) / "checkpoint-12" / "training_args.json").read_text())
        assert written["per_device_train_clients"] == 2
    assert meter.sizes == [1, 2] and reference.max_difference(*runs.values()) == 0


def test_a_resumed_run_keeps_the_block_that_was_found(tmp_path, monkeypatch):
    args = {**ARGS, "per_device_train_clients": "auto"}
    meter_with(monkeypatch, 125)
    whole = build(tmp_path / "whole", args, {"dropout": 0.1})
    whole.train()
    build(tmp_path / "run", {**args, "num_rounds": 1}, {"dropout": 0.1}).train()
    other = meter_with(monkeypatch, 1000)  # all five would fit now
    resumed = build(tmp_path / "run", args, {"dropout": 0.1})
    resumed.train(resume_from_checkpoint=True)
    assert other.sizes == [] and resumed.layout.block_size == 2
    assert reference.max_difference(*(reference.read_adapter(t.model) for t in (whole, resumed))) == 0
    assert [line["round"] for line in ledger(tmp_path / "run")] == [0, 1]


def test_processes_take_a_block_that_fits_all_of_them(tmp_path, monkeypatch):
    meter_with(monkeypatch, 1000)
    made = build(tmp_path, {**ARGS, "per_device_train_clients": "auto"})
    monkeypatch.setattr(local_steps, "gather", lambda found: [found, 2])
    assert made._fit_block() == 2


def test_not_even_one_client_fits(tmp_path, monkeypatch):
    meter_with(monkeypatch, 105)
    made = build(tmp_path, {**ARGS, "per_device_train_clients": "auto"})
    with pytest.raises(ValueError, match="^Expected a step of one client to fit into the 0.00 GB .*lower per_device"):
        made.train()
    assert not (tmp_path / "rounds.jsonl").exists()
    with pytest.raises(ValueError, match="found that it takes more than that"):
        monkeypatch.setattr(FakeMeter, "peak", lambda self, step: None)
        made.train()


@pytest.mark.slow
def test_auto_measures_this_machine(tmp_path):
    """Nothing faked: five tiny clients fit at once."""
    made = build(tmp_path / "auto", {**ARGS, "per_device_train_clients": "auto"})
    made.train()
    alone = build(tmp_path / "one", ARGS)
    alone.train()
    assert made.layout.block_size == 5 and alone.layout.block_size == 1
    assert reference.max_difference(*(reference.read_adapter(t.model) for t in (made, alone))) < 1e-9
