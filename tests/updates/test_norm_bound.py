"""An update far larger than the others' is left out: by any method, in the first round, and after resuming."""

import math
from types import SimpleNamespace

import numpy as np
import pytest

from fslora_hf.federation.packet import Packet
from fslora_hf.federation.roster import FederationError
from fslora_hf.storage.ledger import append_round, last_records
from fslora_hf.updates.norm_bound import PAST_ROUNDS, NormBound
from tests.support import federated
from tests.support.worker_train import ledger

POISON = 9.9e5  # below max-update-norm


def clients(*ranks):
    return [SimpleNamespace(client_id=number, rank=rank) for number, rank in enumerate(ranks)]


def record(rate, norms, ranks=None):
    return {"learning_rate": rate, "update_norms": norms, "ranks": ranks or [4] * len(norms)}


def refused(bound, norms, ranks=None, rate=1e-3):
    """Who is beyond the bound, of clients with these norms."""
    cohort = clients(*(ranks or [4] * len(norms)))
    given = dict(enumerate(norms))
    bounds = bound.bounds(cohort, given, rate, dict.fromkeys(given, 1000))
    return [number for number, norm in given.items() if norm > bounds[number]]


# ---- The bound itself ----


@pytest.mark.parametrize(
    ("past", "norms", "ranks", "rate", "out"),
    [
        ([], [0.1, 0.12, POISON], None, 1e-3, [2]),
        ([], [POISON, 0.1], None, 1e-3, [0]),  # one of two, in the first round
        ([], [POISON], None, 1e-3, [0]),  # alone in the first round: beyond what Adam could do
        ([], [0.1], None, 1e-3, []),
        ([], [POISON, math.nan, 0.1], None, 1e-3, [0]),
        ([], [0.1, 0.0], None, 1e-3, []),  # who has learned nothing tells nothing of the others
        ([], [0.0, POISON], None, 0.0, [1]),  # warm-up: honest ones do not move
        ([], [POISON], None, 0.0, [0]),
        ([], [0.1, 0.8, 0.9], [1, 64, 64], 1e-3, []),  # by the root of the ranks, whichever way it goes
        ([], [0.9, 0.9, 0.02, 0.02], [1, 1, 64, 64], 1e-3, []),
        ([], [0.1, 0.1, POISON], [1, 64, 64], 1e-3, [2]),
        ([record(1e-3, [0.1])], [POISON], None, 1e-3, [0]),  # one client a round
        ([record(1e-3, [0.1])], [0.5], None, 1e-3, []),
        ([record(1e-3, [0.1] * 4)] * 3, [POISON, POISON, 0.1], None, 1e-3, [0, 1]),  # most of an unlucky cohort
        ([record(1e-3, [POISON, 0.1, 0.1])], [0.1, 0.1, 5.0], None, 1e-3, [2]),  # what was refused counts little
        ([record(1e-5, [0.001])], [0.1], None, 1e-3, []),  # a rate that grows
        ([record(1e-3, [0.1])], [0.1], None, 1e-6, [0]),  # and one that falls
        ([record(0.0, [0.0, 0.0])], [0.1, POISON], None, 1e-3, [1]),
        ([record(1e-3, [None, 0.1])], [0.1], None, 1e-3, []),
    ],
)  # fmt: skip
def test_who_is_beyond_the_bound(past, norms, ranks, rate, out):
    bound = NormBound(10, local_steps=10)
    bound.restore(past)
    assert refused(bound, norms, ranks, rate) == out


def test_norms_that_really_grow_are_taken_after_some_rounds():
    bound, rounds = NormBound(10, local_steps=10), 0
    bound.restore([record(1e-3, [0.1, 0.1])] * PAST_ROUNDS)
    while refused(bound, [2.0, 2.0]):
        bound.note(record(1e-3, [2.0, 2.0]))
        rounds += 1
    assert 0 < rounds <= PAST_ROUNDS / 2 + 1


@pytest.mark.parametrize("rate", [1e-6, 0.0])
def test_what_waits_with_the_clients_does_not_shrink_with_the_rate(rate):
    bound = NormBound(10, local_steps=10, keeps_rest=True)
    bound.restore([record(1e-3, [0.1, 0.1])] * PAST_ROUNDS)
    assert refused(bound, [0.1, 0.2, POISON], rate=rate) == [2]
    assert refused(bound, [5.0, 5.0], rate=1e-2) == []  # a rate that grows, as ever


def test_a_record_that_says_less_is_passed_over():
    bound = NormBound(10, local_steps=10)
    bound.restore(
        [{}, record(1e-3, 3, [1]), record("much", [1.0]), record(1e-3, [1.0, 2.0], [1]), record(1e-3, [0.1])]
    )
    assert refused(bound, [1.1]) == [0] and not refused(bound, [0.9])


def test_the_end_of_a_ledger_is_read_without_the_rest(tmp_path, monkeypatch):
    path = tmp_path / "rounds.jsonl"
    assert last_records(path, 3) == []
    monkeypatch.setattr("fslora_hf.storage.ledger._TAIL", 50)
    for number in range(40):
        append_round(path, {"round": number, "text": "x" * number})
    assert [line["round"] for line in last_records(path, 3)] == [37, 38, 39]
    assert [line["round"] for line in last_records(path, 50)] == list(range(40))
    with open(path, "a") as file:
        file.write('{"round": 4')
    assert [line["round"] for line in last_records(path, 2)] == [38, 39]
    damaged = b"\xff" + path.read_bytes()
    path.write_bytes(damaged)
    assert [line["round"] for line in last_records(path, 50)] == list(range(1, 40))


# ---- In a federation ----


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return federated.write_model_and_rows(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def kept_nodes(source):
    return federated.make_nodes(source)


@pytest.fixture
def nodes(kept_nodes):
    return dict(kept_nodes)


def poisoned(node, rounds, **header):
    """A node whose updates of these rounds have the norm POISON, and which may lie about it."""

    def answer(packet):
        good = node(packet)
        if packet.kind != "train" or packet.header["round"] not in rounds:
            return good
        name = max(good.tensors, key=lambda name: (good.tensors[name].dtype.kind == "f", good.tensors[name].size))
        wrong = np.full_like(good.tensors[name], POISON / math.sqrt(good.tensors[name].size))
        return Packet({**good.header, **header}, {**good.tensors, name: wrong})

    return answer


FULL = {"client_ranks": [6, 6, 6, 6]}


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "fslora"},
        {"method": "hetlora"},
        {"method": "flexlora"},
        {"method": "flora"},
        {"method": "flora_residual"},
        {"method": "fedit", **FULL},
        {"method": "ffa_lora", **FULL},
        {"upload_top_k": 0.3},
        {"upload_top_k": 0.3, "error_feedback": True},
    ],
    ids=lambda settings: "-".join(str(value) if name == "method" else name for name, value in settings.items()),
)
def test_no_node_captures_a_run_at_default_settings(tmp_path, source, nodes, settings):
    """Not in the first round, and not later; whatever norm it claims."""
    recipe = federated.write_recipe(source, tmp_path, clients_per_round=None, server_optim="sgd", **settings)
    nodes[102] = poisoned(nodes[102], rounds=(0, 2), norm=0.1)
    exchange = federated.LocalExchange(nodes)
    federated.federate(recipe, exchange)
    first, second, third = ledger(tmp_path / "run")
    for line in (first, third):
        (one,) = line["refused"]
        assert one["client_id"] == 2 and line["weights"][2] == 0 and min(np.delete(line["weights"], 2)) > 0
        assert (
            f"the norm of the update, 9.9e+05, is beyond the bound of {line['norm_bounds'][2]:.6g}, 10 times"
            in (one["reason"])
        )
        assert line["update_norms"][2] == pytest.approx(POISON, rel=1e-3)
    assert second["refused"] == []
    asked = [packet.header["notice"] for node, packet in exchange.sent if node == 102 and packet.kind == "train"]
    assert asked == [None, first["refused"][0]["reason"], None]
    for line in (first, second, third):
        honest = [n for n, taken in zip(line["update_norms"], line["weights"], strict=True) if taken]
        assert max(honest) < 10 and all(honest[0] < bound < 1000 for bound in line["norm_bounds"])


def test_a_run_of_one_client_a_round_is_held_to_its_past_after_it_is_resumed_too(tmp_path, source, nodes):
    settings = {"clients_per_round": 1, "num_rounds": 3, "save_rounds": 1, "client_ranks": [6, 6, 6, 6]}
    recipe = federated.write_recipe(source, tmp_path, **settings)
    every = {number: poisoned(node, rounds=(2,)) for number, node in nodes.items()}
    with pytest.raises(FederationError, match="beyond the bound of .* .max-norm-ratio."):
        federated.federate(recipe, federated.LocalExchange(every))
    assert len(ledger(tmp_path / "run")) == 2
    with pytest.raises(FederationError, match="beyond the bound of"):
        federated.federate(recipe, federated.LocalExchange(every), resume=True)
    federated.federate(recipe, federated.LocalExchange(every), resume=True, max_norm_ratio=0.0)
    *_, last = ledger(tmp_path / "run")
    assert last["refused"] == [] and "norm_bounds" not in last
    assert last["update_norms"] == [pytest.approx(POISON, rel=1e-3)]


def test_the_first_update_of_all_is_held_to_what_adam_can_do(tmp_path, source, nodes):
    recipe = federated.write_recipe(source, tmp_path, clients_per_round=1, num_rounds=1)
    every = {number: poisoned(node, rounds=(0,)) for number, node in nodes.items()}
    with pytest.raises(FederationError, match="beyond the bound of"):
        federated.federate(recipe, federated.LocalExchange(every))
