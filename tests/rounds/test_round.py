"""One round without the trainer: hand-over, folding with refusals, the ledger's record, and other layouts."""

import math
import threading

import numpy as np
import pytest
import torch
from peft import get_peft_model

from fslora_hf.data.clients import ClientIndex
from fslora_hf.methods import METHODS, FSLoRA
from fslora_hf.models.adapter import global_pair, lora_layers
from fslora_hf.models.stack import ClientStack
from fslora_hf.rounds.layout import Layout
from fslora_hf.rounds.local import LocalClients
from fslora_hf.rounds.plan import plan_round
from fslora_hf.rounds.round import Round
from fslora_hf.rounds.run import FederatedRun
from fslora_hf.rounds.server import ServerState
from fslora_hf.updates.bounds import CheckFinite
from fslora_hf.updates.part import RefusedUpdate, UpdatePart
from fslora_hf.updates.pipeline import Pipeline
from tests.support import reference, tiny

R, RANKS, LOCAL_STEPS = 6, [1, 2, 3, 4, 6], 2
IDS = [0, 10, 20, 30, 40]
SIZES = [1, 2, 3, 4, 5]


def plan(round: int):
    return plan_round(
        round,
        seed=0,
        index=ClientIndex.from_column(np.repeat(IDS, SIZES)),
        ranks=np.array(RANKS),
        global_rank=R,
        clients_per_round=5,
        local_steps=LOCAL_STEPS,
        examples_per_step=3,
        learning_rate=lambda round: 0.1 / (round + 1),
        client_weighting="num_examples",
    )


def make_run(block_size=5, processes=1, process=0, method=FSLoRA, parts=(), **options) -> FederatedRun:
    """A run whose two halves are of this process; its `model` is what clients train in."""
    model = get_peft_model(tiny.base_model(), tiny.lora_config(R, zero_b=False))
    with torch.no_grad():  # the same global adapter wherever and whenever it is made
        for n, tensor in enumerate(t for side in global_pair(model) for t in side.values()):
            tensor.copy_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(n), dtype=tensor.dtype))
    stack = ClientStack(model, block_size, max(RANKS))
    stack.attach()
    layout, updates = Layout(5, LOCAL_STEPS, block_size, processes, process), Pipeline(parts)
    round = Round(method=method(), state=ServerState(*global_pair(model)), updates=updates, **options)
    run = FederatedRun(plan, layout, num_rounds=9)
    run.open(LocalClients(layout=layout, stack=stack, receive=round.give, updates=updates), round)
    run.model = model
    return run


def train(run: FederatedRun, steps=None) -> None:
    """Stands for local training: client c adds c + 1 to what it holds, and has the loss c + local step. So do borrowed
    clients."""
    for slot, client in enumerate(run.clients.seated):
        with torch.no_grad():
            for layer in lora_layers(run.model).values():
                layer.client_A[slot, : client.rank] += client.client_id + 1
                layer.client_B[slot, :, : client.rank] += client.client_id + 1
    for step in range(LOCAL_STEPS):
        run.clients.record_loss(torch.tensor([float(client.client_id + step) for client in run.clients.seated]))


def run_round(run: FederatedRun, round: int = 0) -> dict:
    run.begin_round(round)
    for wave in range(run.layout.waves):
        run.hand_over(wave)
        train(run)
        run.collect()
    return run.aggregate()


def expected_pair(start: reference.Adapter, refused=(), round: int = 0) -> reference.Adapter:
    """The weighted mean over accepted clients of their changes, put back at their rows and columns."""
    clients = [client for client in plan(round).clients if client.client_id not in refused]
    total = math.fsum(client.weight for client in clients)
    result = {}
    for name, (A, B) in start.items():
        A, B = A.clone(), B.clone()
        for client in clients:
            rows = torch.as_tensor(client.sketch(name))
            A[rows] += client.weight / total * (client.client_id + 1)
            B[:, rows] += client.weight / total * (client.client_id + 1)
        result[name] = A, B
    return result


@pytest.mark.parametrize("block_size", [1, 2, 3, 5])
def test_a_round_folds_the_weighted_mean_whatever_the_blocks(block_size):
    run = make_run(block_size)
    start = reference.read_adapter(run.model)
    record = run_round(run)
    assert reference.max_difference(reference.read_adapter(run.model), expected_pair(start)) < 1e-12
    bytes_per_rank = 8 * sum(A.shape[1] + B.shape[0] for A, B in start.values())
    assert record["clients"] == IDS and record["ranks"] == RANKS and record["refused"] == []
    assert record["weights"] == pytest.approx([n / 15 for n in SIZES])
    assert record["losses"] == [c + 0.5 for c in IDS]
    numbers = [k * sum(A.shape[1] + B.shape[0] for A, B in start.values()) for k in RANKS]
    norms = [(c + 1) * math.sqrt(n) for c, n in zip(IDS, numbers, strict=True)]
    assert record["update_norms"] == pytest.approx(norms, rel=1e-12)
    assert record["bytes_down"] == record["bytes_up"] == sum(RANKS) * bytes_per_rank
    assert record["bytes_full_rank"] == 2 * 5 * R * bytes_per_rank
    assert record["round"] == 0 and record["learning_rate"] == 0.1 and record["seconds"] >= 0


class Refuse(UpdatePart):
    def __init__(self, *client_weights):
        self.client_weights = client_weights

    def take(self, round, client, update):
        if any(math.isclose(update.weight, weight) for weight in self.client_weights):
            raise RefusedUpdate(f"weight {update.weight:.3f} is not wanted")
        return update


def test_refused_updates_leave_the_others_shares_in_proportion():
    run = make_run(2, parts=[CheckFinite(), Refuse(2 / 15, 4 / 15)])
    start = reference.read_adapter(run.model)
    record = run_round(run)
    assert reference.max_difference(reference.read_adapter(run.model), expected_pair(start, (10, 30))) < 1e-12
    assert record["weights"] == pytest.approx([1 / 9, 0, 3 / 9, 0, 5 / 9])
    assert record["refused"] == [
        {"client_id": 10, "reason": "weight 0.133 is not wanted"},
        {"client_id": 30, "reason": "weight 0.267 is not wanted"},
    ]
    assert all(loss is not None for loss in record["losses"])  # what a refused client did is still told


def test_the_ledger_holds_the_weights_that_the_method_gave():
    """hetlora's are in proportion to the norms of the products; a refused client has none."""
    run = make_run(2, method=METHODS["hetlora"], parts=[CheckFinite(), Refuse(4 / 15)])
    start = reference.read_adapter(run.model)
    record = run_round(run)
    parts = []
    for client in plan(0).clients:
        k, step = client.rank, client.client_id + 1
        held = [(A[:k] + step, B[:, :k] + step) for A, B in start.values()]
        parts.append(client.weight * torch.cat([(B @ A).flatten() for A, B in held]).norm().item())
    parts[3] = 0.0
    assert record["weights"] == pytest.approx([part / sum(parts) for part in parts], rel=1e-12)


class Halve(UpdatePart):
    def take(self, round, client, update):
        for side in (update.A, update.B):
            for tensor in side.values():
                tensor.mul_(0.5)
        return update


def test_a_part_may_change_an_update():
    run = make_run(parts=[Halve()])
    start = reference.read_adapter(run.model)
    run_round(run)
    whole = expected_pair(start)
    half = {n: tuple((old + new) / 2 for old, new in zip(start[n], whole[n], strict=True)) for n in start}
    assert reference.max_difference(reference.read_adapter(run.model), half) < 1e-12


def test_a_round_without_a_usable_update_changes_nothing():
    run = make_run(2, parts=[Refuse(*(n / 15 for n in SIZES))])
    start = reference.read_adapter(run.model)
    record = run_round(run)
    assert reference.max_difference(reference.read_adapter(run.model), start) == 0
    assert record["weights"] == [0.0] * 5 and len(record["refused"]) == 5


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_an_update_that_is_not_finite_is_left_out(value):
    run = make_run(5, parts=[CheckFinite()])
    start = reference.read_adapter(run.model)
    run.begin_round(0)
    run.hand_over(0)
    train(run)
    slot = [client.client_id for client in run.clients.block].index(20)
    with torch.no_grad():
        list(lora_layers(run.model).values())[-1].client_B[slot, 0, 0] = value
    run.clients.record_loss(torch.tensor([value if i == slot else 0.0 for i in range(5)]))
    run.collect()
    record = run.aggregate()
    assert reference.max_difference(reference.read_adapter(run.model), expected_pair(start, (20,))) < 1e-12
    assert record["refused"] == [{"client_id": 20, "reason": "the update is not finite"}]
    assert record["losses"][2] is None and record["update_norms"][2] is None and record["weights"][2] == 0.0


def test_rounds_do_not_leak_into_each_other():
    """Every round starts with an empty fold, no losses and the global adapter that the last one left."""
    run = make_run(2, parts=[CheckFinite()])
    for t in range(3):
        start = reference.read_adapter(run.model)
        record = run_round(run, t)
        end = expected_pair(start, round=t)
        assert reference.max_difference(reference.read_adapter(run.model), end) < 1e-11
        assert record["round"] == t and record["losses"] == [c + 0.5 for c in IDS] and len(record["clients"]) == 5


def test_the_global_adapter_is_active_between_blocks():
    run = make_run(2)
    ids = torch.tensor([[3, 4, 5]])
    expected = run.model(input_ids=ids).logits
    run.begin_round(0)
    run.hand_over(0)
    with run.clients.stack.at_work(2 * ids.numel()):
        assert not torch.allclose(run.model(input_ids=ids.repeat(2, 1)).logits[:1], expected)
    train(run)
    run.collect()
    assert torch.equal(run.model(input_ids=ids).logits, expected)  # folded only when the round closes
    run.hand_over(1)
    run.clients.abandon()
    assert torch.equal(run.model(input_ids=ids).logits, expected) and run.clients.stack.clients == 0


class Threads:
    """Two processes' collectives, played by two threads."""

    def __init__(self):
        self.barrier, self.slots = threading.Barrier(2), [None, None]

    def exchange(self, process, value) -> list:
        self.slots[process] = value
        self.barrier.wait(timeout=30)
        values = list(self.slots)
        self.barrier.wait(timeout=30)
        return values

    def options(self, process) -> dict:
        return {
            "sum_over_processes": lambda t: t.copy_(sum(self.exchange(process, t.clone()))),
            "gather": lambda objects: [o for part in self.exchange(process, objects) for o in part],
        }


@pytest.mark.parametrize(
    "block_size, idle, method",
    [(2, 1, "fslora"), (1, 1, "fslora"), (3, 0, "fslora"), (5, 1, "fslora"), (2, 1, "hetlora"), (2, 1, "flexlora")],
)
def test_two_processes_equal_one(block_size, idle, method):
    """Five clients in blocks of two on two processes: a ragged block, then a borrowed one that counts for nothing."""
    threads, method = Threads(), METHODS[method]
    alone = make_run(5, method=method)
    runs = [make_run(block_size, 2, process, method, **threads.options(process)) for process in (0, 1)]
    assert runs[0].layout.waves == runs[1].layout.waves
    blocks = [run.layout.block(plan(0), wave) for run in runs for wave in range(run.layout.waves)]
    assert sorted(c.client_id for block in blocks for c in block) == IDS and sum(not b for b in blocks) == idle
    expected = run_round(alone)
    records = [None, None]
    workers = [
        threading.Thread(target=lambda i=i: records.__setitem__(i, run_round(runs[i])), daemon=True) for i in (0, 1)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    for run, record in zip(runs, records, strict=True):
        end = reference.read_adapter(run.model)
        assert reference.max_difference(end, reference.read_adapter(alone.model)) < 1e-11
        rounded = {"update_norms", "truncation_error"} & expected.keys()
        for key in expected.keys() - {"seconds"} - rounded:
            assert record[key] == expected[key], key
        for key in rounded:
            assert record[key] == pytest.approx(expected[key], rel=1e-12), key


def test_loss_shares_make_the_mean_over_the_clients_of_a_wave():
    """The trainer averages what processes report: 5 clients in blocks of 2 on 2 processes are 4, then 1."""
    runs = [make_run(2, 2, process) for process in (0, 1)]
    for run in runs:
        run.begin_round(0)
    for wave, clients in ((0, 4), (1, 1)):
        for run in runs:
            run.hand_over(wave)
        summed = [sum(float(c.client_id) for c in run.clients.seated) * run.clients.loss_share for run in runs]
        present = [c.client_id for run in runs for c in run.clients.block]
        assert len(present) == clients and sum(summed) / 2 == pytest.approx(np.mean(present))
