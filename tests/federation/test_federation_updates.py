"""Updates of which nodes leave a part out, and base models that learn on every node: both outlast what fails."""

import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fslora_hf.federation.folds import Folds, bring_up
from fslora_hf.federation.node_feedback import NodeFeedback, feedback_of
from fslora_hf.federation.packet import Packet
from fslora_hf.federation.roster import FederationError
from fslora_hf.federation.sparse import pack, unpack
from fslora_hf.federation.trainer import last_folded
from fslora_hf.models.folding import FoldedBase
from fslora_hf.models.stack import ClientStack
from fslora_hf.updates.part import RefusedUpdate
from fslora_hf.updates.top_k import TopK
from tests.support import federated, reference
from tests.support.worker_train import check_same_ledger, ledger

PLAIN = {"server_optim": "sgd", "num_rounds": 4, "clients_per_round": None, "save_rounds": 1}
SPARSE = {**PLAIN, "upload_top_k": 0.3, "error_feedback": True}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return federated.write_model_and_rows(tmp_path_factory.mktemp("source"))


def check_same_adapter(tmp_path):
    adapters = [federated.saved_adapter(tmp_path / name) for name in ("run", "simulated")]
    assert reference.max_difference(*adapters) < 1e-9


# ---- Sparse updates on the wire ----

SHAPES = {"A.m.1": (3, 17), "A.m.0": (3, 15), "B.m.0": (4, 6)}  # 120 numbers: a mask of them takes 15 bytes


def sparse(share, dtype=np.float32):
    rng = np.random.default_rng(0)
    flat = np.zeros(120, dtype=dtype)
    kept = math.ceil(share * 120)
    flat[rng.permutation(120)[:kept]] = rng.normal(size=kept)
    pieces = np.split(flat, [45, 96])
    return {name: piece.reshape(SHAPES[name]) for name, piece in zip(sorted(SHAPES), pieces, strict=True)}


@pytest.mark.parametrize(
    "share, names", [(0.02, {"values", "places"}), (0.3, {"values", "mask"}), (1.0, SHAPES), (0.99, SHAPES)]
)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_sparse_update_comes_out_as_it_went_in_and_takes_the_bytes_of_the_ledger(share, names, dtype):
    tensors = sparse(share, dtype)
    arrays = Packet.from_bytes(Packet({}, pack(tensors, share)).to_bytes()).tensors
    if dtype == np.float32 or share < 0.99:  # of wide numbers, a mask still saves something
        assert arrays.keys() == set(names)
    itemsize = np.dtype(dtype).itemsize
    assert sum(array.nbytes for array in arrays.values()) == TopK(share, None).bytes_up(120 * itemsize, itemsize)
    again = unpack(arrays, SHAPES, np.dtype(dtype), share)
    assert again.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(again[name], tensor)
        assert again[name].dtype == dtype


def test_an_update_of_fewer_numbers_than_may_be_sent_is_filled_with_zeros():
    tensors = sparse(0.02)
    arrays = pack(tensors, 0.3)
    assert arrays["values"].shape == (36,) and np.count_nonzero(arrays["values"]) == 3
    for name, tensor in unpack(arrays, SHAPES, np.dtype(np.float32), 0.3).items():
        np.testing.assert_array_equal(tensor, tensors[name])


@pytest.mark.parametrize(
    "share, change, message",
    [
        (0.025, {"values": None}, "holds nothing as its values, not 3 of float32"),
        (0.025, {"values": np.zeros(3)}, "holds float64 of shape .3,. as its values"),
        (0.025, {"values": np.zeros(4, np.float32)}, "holds float32 of shape .4,. as its values"),
        (0.025, {"places": np.zeros(3, np.int64)}, "as its places, not 3 of uint32"),
        (0.025, {"places": np.array([1, 1, 2], np.uint32)}, "places that do not ascend"),
        (0.025, {"places": np.array([2, 1, 3], np.uint32)}, "places that do not ascend"),
        (0.025, {"places": np.array([1, 2, 120], np.uint32)}, "other than 3 places below 120"),
        (0.025, {"more": np.zeros(1)}, "holds more, which was not asked for"),
        (0.3, {"mask": np.zeros(15, np.uint8)}, "other than 36 places below 120"),
        (0.3, {"mask": np.zeros(16, np.uint8)}, "as its mask, not 15 of uint8"),
        (0.3, {"places": np.zeros(3, np.uint32)}, "holds places, which was not asked for"),
    ],
)
def test_sparse_updates_that_are_not_sound_are_refused(share, change, message):
    arrays = pack(sparse(share), share) | change
    arrays = {name: array for name, array in arrays.items() if array is not None}
    with pytest.raises(RefusedUpdate, match=message):
        unpack(arrays, SHAPES, np.dtype(np.float32), share)


# ---- What nodes leave out ----


def test_what_was_left_out_of_an_update_that_was_not_folded_is_void(tmp_path, source, monkeypatch):
    """As in the simulator, where a refused update leaves the client's memory as it was."""
    recipe = federated.write_recipe(source, tmp_path, **SPARSE)
    nodes = federated.make_nodes(tmp_path)
    sound = nodes[102]

    def spoiled(packet):
        answer = sound(packet)
        if packet.kind == "train" and packet.header["round"] == 1:
            return Packet(answer.header, answer.tensors | {"values": answer.tensors["values"] * np.nan})
        return answer

    nodes[102] = spoiled
    federated.federate(recipe, federated.LocalExchange(nodes))
    looked_at = []

    def refuse_once(update):
        looked_at.append(update.position)
        if update.position == 2 and looked_at.count(2) == 2:
            raise RefusedUpdate("the update is not finite")
        return update

    federated.take_by(monkeypatch, refuse_once)
    federated.simulate(recipe, tmp_path / "simulated")
    check_same_adapter(tmp_path)
    assert [len(line["refused"]) for line in ledger(tmp_path / "run")] == [0, 1, 0, 0]


def test_an_update_that_is_not_finite_is_refused_whatever_is_left_out_of_it(tmp_path, source, monkeypatch):
    """And leaves nothing of it in what the node keeps."""
    change, calls = ClientStack.change, []

    def spoiled(self, slot):
        A, B = change(self, slot)
        calls.append(slot)
        if len(calls) == 6:  # client 1's in round 1
            next(iter(A.values()))[0, 0] = math.inf
        return A, B

    monkeypatch.setattr(ClientStack, "change", spoiled)
    recipe = federated.write_recipe(source, tmp_path, **SPARSE)
    federated.federate(recipe, federated.LocalExchange(federated.make_nodes(tmp_path)))
    found = [{one["client_id"]: one["reason"] for one in line["refused"]} for line in ledger(tmp_path / "run")]
    assert found == [{}, {1: "the update is not finite"}, {}, {}]


class Killed(BaseException):
    """As a signal would: nothing is saved on the way out."""


@pytest.mark.parametrize("back", [1, 3])
@pytest.mark.parametrize("restarted", [False, True], ids=["nodes-stay", "nodes-restart"])
def test_a_server_that_goes_back_finds_what_its_nodes_had_left_out_then(tmp_path, source, back, restarted):
    """Killed after its nodes have trained round 3, and taken up from the checkpoint of an earlier one."""
    recipe = federated.write_recipe(source, tmp_path, **SPARSE)
    federated.simulate(recipe, tmp_path / "simulated")

    def start():
        return {100 + client: made for client in range(federated.CLIENTS)
                for made in federated.make_nodes(tmp_path, [client], memory=str(tmp_path / f"memory-{client}"))
                .values()}  # fmt: skip

    nodes = start()
    exchange = federated.LocalExchange(nodes)
    receive = exchange.receive

    def killed_in_round_3(tickets):
        if sum(packet.header.get("round") == 3 for _, packet in exchange.came) == federated.CLIENTS:
            raise Killed
        return receive(tickets)

    exchange.receive = killed_in_round_3
    with pytest.raises(Killed):
        federated.federate(recipe, exchange)
    for later in range(back + 1, 4):
        (tmp_path / "run" / f"checkpoint-{later}").rename(tmp_path / f"gone-{later}")
    federated.federate(recipe, federated.LocalExchange(start() if restarted else nodes), resume=True)
    check_same_adapter(tmp_path)
    check_same_ledger(tmp_path / "run", tmp_path / "simulated")


def test_a_node_keeps_the_files_of_checkpoints_and_of_its_last_update_only(tmp_path, source):
    recipe = federated.write_recipe(source, tmp_path, **SPARSE | {"num_rounds": 6, "save_rounds": 2})
    nodes = federated.make_nodes(tmp_path)
    federated.federate(recipe, federated.LocalExchange(nodes), overrides="--save_total_limit 2")
    run = json.loads((tmp_path / "run" / "federation.json").read_text())["run"]
    files = sorted((tmp_path / "node-1" / "error_feedback" / run / "1").iterdir())
    # In round 5 the server has checkpoints of rounds 2 and 4: what was left out after rounds 1 and 3, and 4, and 5.
    assert [int(path.name.split("-")[0]) for path in files] == [1, 3, 4, 5]


def test_a_node_that_has_lost_what_it_left_out_says_so_and_begins_anew(tmp_path, source, caplog):
    recipe = federated.write_recipe(source, tmp_path, **SPARSE)
    nodes = federated.make_nodes(tmp_path)
    exchange, kept = federated.LocalExchange(nodes), nodes[103]

    def emptied(packet):
        if packet.kind == "train" and packet.header["round"] == 2:
            for path in (tmp_path / "node-1" / "error_feedback").rglob("*.safetensors"):
                path.unlink()
        return kept(packet)

    # Client 3 is asked last in round 2, so that client 1 misses its files in round 3.
    exchange.nodes_by_number[103] = emptied
    federated.federate(recipe, exchange)
    assert caplog.text.count("Expected what was left out of the update of round 2") == 1
    assert [line["refused"] for line in ledger(tmp_path / "run")] == [[], [], [], []]


def test_settling_goes_back_to_what_the_server_has(tmp_path):
    feedback = NodeFeedback(tmp_path)

    def write(*rounds):
        (tmp_path / "4").mkdir(exist_ok=True)
        for round in rounds:
            (tmp_path / "4" / f"{round:08d}-0000.safetensors").touch()

    def rounds():
        return sorted(int(path.name.split("-")[0]) for path in (tmp_path / "4").iterdir())

    write(1, 3, 4, 7, 9)
    feedback.settle(4, 7, [2, 4, 7])  # whose last rounds are 1, 3 and 6
    assert rounds() == [1, 3, 4, 7]
    feedback.settle(4, 3, [])
    assert rounds() == [3]
    write(5)
    feedback.settle(4, 4, [5])  # which it does not have
    assert rounds() == []
    write(5)
    feedback.settle(4, None, [])
    assert rounds() == []


def test_a_ledger_tells_which_update_of_a_client_was_folded_last():
    refused = [{"client_id": 2, "reason": "of the test"}]
    records = [{"round": 0, "clients": [1, 2, 5], "refused": []}, {"round": 3, "clients": [1, 2], "refused": refused}]
    assert last_folded(records) == {1: 3, 2: 0, 5: 0} and last_folded([]) == {}


@pytest.mark.parametrize("run", ["", "../../elsewhere", "0123456789abcde", "0123456789ABCDEF"])
def test_what_a_run_is_called_names_no_folder_elsewhere(tmp_path, run):
    with pytest.raises(ValueError, match="Expected a run's number of 16 hexadecimal digits"):
        feedback_of(tmp_path, run)


def test_only_what_is_needed_is_told_of_error_feedback(tmp_path, source):
    recipe = federated.write_recipe(source, tmp_path, **SPARSE | {"num_rounds": 2})
    exchange = federated.LocalExchange(federated.make_nodes(tmp_path))
    federated.federate(recipe, exchange)
    asked = [packet.header for node, packet in exchange.sent if packet.kind == "train" and node == 101]
    assert [(one["folded"], one["checkpoints"]) for one in asked] == [(None, []), (0, [1])]
    told = [packet for node, packet in exchange.came if packet.kind == "update" and node == 101]
    assert {name for packet in told for name in packet.tensors} == {"values", "mask"}
    assert set(told[0].header) == {"protocol", "kind", "round", "client_id", "loss"}


# ---- Bases that learn ----


def folded_base(folder):
    return load_file(folder / "folded_base.safetensors")


def check_same_base(folder, expected_folder):
    found, expected = folded_base(folder), folded_base(expected_folder)
    assert found.keys() == expected.keys()
    assert max((found[name] - expected[name]).abs().max().item() for name in expected) < 1e-9


FLORA = {**PLAIN, "method": "flora"}


@pytest.fixture
def large_base(monkeypatch):
    """As real models have, of which stacks are a small part."""
    monkeypatch.setattr(FoldedBase, "bytes", property(lambda self: 1_000_000_000))


def flora(source, tmp_path, **settings):
    recipe = federated.write_recipe(source, tmp_path, **FLORA | settings)
    federated.simulate(recipe, tmp_path / "simulated")
    return recipe


@pytest.mark.parametrize(
    "settings", [{}, {"clients_per_round": 3}, {"upload_top_k": 0.4}], ids=["flora", "away", "top-k"]
)
def test_a_base_that_learns_is_the_simulators_and_that_of_every_node(tmp_path, source, large_base, settings):
    """Whoever was away in a round is brought what it missed; the base of an earlier run is loaded anew."""
    recipe = flora(source, tmp_path, **settings)
    nodes = federated.make_nodes(tmp_path)
    for run in ("run", "again"):
        exchange = federated.LocalExchange(nodes)
        federated.federate(recipe, exchange, overrides=f"--output_dir {tmp_path / run}")
        check_same_ledger(tmp_path / run, tmp_path / "simulated", beside=["bytes_down"])
        check_same_base(tmp_path / run, tmp_path / "simulated")
        sent = [packet for _, packet in exchange.sent if packet.kind == "train"]
        assert not any(name.startswith("base.") for packet in sent for name in packet.tensors)
        down = [sum(p.tensor_bytes for p in sent if p.header["round"] == round) for round in range(4)]
        assert [line["bytes_down"] for line in ledger(tmp_path / run)] == down and down[0] == 0 < down[1]
    last = ledger(tmp_path / "run")[-1]["clients"]
    before = load_file(tmp_path / "run" / "checkpoint-3" / "folded_base.safetensors")
    for client in last:
        own = FoldedBase.of(nodes[100 + client].__self__._trainer.model).weights
        assert max((own[name] - before[f"{name}.weight"]).abs().max().item() for name in own) < 1e-9


def test_nodes_that_miss_a_round_are_brought_what_it_added(tmp_path, source, large_base):
    """One hears nothing of round 1 for the deadline's sake, another's answer is lost after it has folded."""
    recipe = federated.write_recipe(source, tmp_path, **FLORA | {"num_rounds": 5})
    nodes = federated.make_nodes(tmp_path)
    sound = {number: nodes[number] for number in (101, 102)}
    first = {"kind": "train", "round": 1}

    def is_first(packet):
        return first.items() <= packet.header.items()

    nodes[101] = lambda packet: None if is_first(packet) else sound[101](packet)
    nodes[102] = lambda packet: (sound[102](packet), None)[1] if is_first(packet) else sound[102](packet)
    exchange = federated.LocalExchange(nodes)
    federated.federate(recipe, exchange)
    assert [[one["client_id"] for one in line["refused"]] for line in ledger(tmp_path / "run")] == [
        [], [1, 2], [1, 2], [], []]  # fmt: skip
    (packet,) = [p for node, p in exchange.sent if node == 102 and p.kind == "train" and p.header["round"] == 3]
    assert {name.split(".")[1] for name in packet.tensors} == {"0", "1", "2"}
    before = load_file(tmp_path / "run" / "checkpoint-4" / "folded_base.safetensors")
    for client in range(federated.CLIENTS):
        own = FoldedBase.of((sound.get(100 + client) or nodes[100 + client]).__self__._trainer.model).weights
        assert max((own[name] - before[f"{name}.weight"]).abs().max().item() for name in own) < 1e-9


def test_a_server_that_is_resumed_gives_its_nodes_the_base_it_had(tmp_path, source):
    recipe = flora(source, tmp_path)
    nodes = federated.make_nodes(tmp_path)

    def broken(node):
        return lambda p: Packet({"kind": "failed"}) if p.kind == "train" and p.header["round"] == 3 else node(p)

    with pytest.raises(FederationError):
        federated.federate(recipe, federated.LocalExchange({n: broken(node) for n, node in nodes.items()}))
    exchange = federated.LocalExchange(nodes)
    federated.federate(recipe, exchange, resume=True)
    assert all(name.startswith("base.") for _, packet in exchange.sent for name in packet.tensors)
    check_same_base(tmp_path / "run", tmp_path / "simulated")
    check_same_ledger(tmp_path / "run", tmp_path / "simulated", beside=["bytes_down"])


def test_a_node_whose_base_was_half_changed_loads_it_anew(tmp_path, source, large_base, monkeypatch):
    recipe = federated.write_recipe(source, tmp_path, **FLORA)
    nodes, fold, calls = federated.make_nodes(tmp_path), FoldedBase.fold, []

    def breaks_once(self, A, B):
        calls.append(self)
        if len(calls) == 3:  # the server's of round 0, then a node's, then another's
            raise RuntimeError("out of memory")
        return fold(self, A, B)

    monkeypatch.setattr(FoldedBase, "fold", breaks_once)
    federated.federate(recipe, federated.LocalExchange(nodes))
    refused = [{one["client_id"]: one["reason"] for one in line["refused"]} for line in ledger(tmp_path / "run")]
    assert refused[0] == {} == refused[3] and refused[1] == {1: "RuntimeError: out of memory"}
    assert refused[2] == {1: "the node was started anew or has joined another run, and has yet to join this one"}
    before = load_file(tmp_path / "run" / "checkpoint-3" / "folded_base.safetensors")
    own = FoldedBase.of(nodes[101].__self__._trainer.model).weights
    assert max((own[name] - before[f"{name}.weight"]).abs().max().item() for name in own) < 1e-9


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_base_is_brought_up_by_stacks_or_as_it_is_bit_for_bit(dtype):
    def base(seed):
        torch.manual_seed(seed)
        return FoldedBase({"m": torch.randn(6, 8).to(dtype), "n": torch.randn(8, 6).to(dtype)}, {"m": 0.5, "n": 2.0})

    def change(seed):
        torch.manual_seed(seed)
        return ({"m": torch.randn(1, 8), "n": torch.randn(1, 6)}, {"m": torch.randn(6, 1), "n": torch.randn(8, 1)})

    server, nodes = base(0), [base(0), base(0)]
    folds = Folds(server)
    for round in range(4):
        given = None if round == 1 else change(round)
        if given is not None:
            server.fold(*given)
        folds.note(round, given)
    name = str(dtype).removeprefix("torch.")
    for node, have in zip(nodes, (0, 3), strict=True):
        for round in range(have):  # it is further than the server thinks
            if round != 1:
                node.fold(*change(round))
        tensors = folds.since(0, 4)
        assert {name.split(".")[0] for name in tensors} == {"fold" if dtype == torch.float32 else "base"}
        assert sum(array.nbytes for array in tensors.values()) <= server.bytes and 0 < folds.bytes <= server.bytes
        bring_up(node, tensors, name, have, 4)
        for module, weight in node.weights.items():
            assert torch.equal(weight, server.weights[module])
    folds.forget(3)
    assert {name.split(".")[0] for name in folds.since(3, 4)} == {"fold"} and not folds.since(4, 4)
    assert {name.split(".")[0] for name in folds.since(2, 4)} == {"base"}
