"""A federation gives the simulator's adapter; what its server and its nodes tell each other, and what they keep."""

import gc
import importlib
import json
import math

import numpy as np
import pytest
import torch

from fslora_hf.common.foreign_text import LONGEST_REASON
from fslora_hf.common.settings import SettingsError
from fslora_hf.federation.packet import Packet
from fslora_hf.federation.roster import FederationError
from fslora_hf.methods import ClientAdapter, ClientUpdate
from fslora_hf.models.folding import FoldedBase
from fslora_hf.rounds.server import ServerState
from fslora_hf.updates.part import RefusedUpdate
from tests.support import federated, reference
from tests.support.worker_train import check_same_ledger, ledger


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return federated.write_model_and_rows(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def kept_nodes(source):
    """Nodes that all tests share, and that load anew what a recipe changes."""
    return federated.make_nodes(source)


@pytest.fixture
def nodes(kept_nodes):
    return dict(kept_nodes)


FULL = {"client_ranks": [6, 6, 6, 6], "server_optim": "sgd"}
PLAIN = {"server_optim": "sgd"}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"sketch_scope": "model", "client_weighting": "num_examples", "gradient_accumulation_steps": 2},
        {"method": "fedit", **FULL},
        {"method": "ffa_lora", **FULL},
        {"method": "hetlora", **PLAIN},
        {"method": "flexlora", **PLAIN},
        {"method": "flora_residual", **PLAIN},
        {"upload_top_k": 0.02},
        {"upload_top_k": 0.3, "error_feedback": True, "num_rounds": 5},
        {"upload_top_k": 0.3, "method": "ffa_lora", "error_feedback": True, **FULL},
        {"client_ranks": None, "rank_distribution": "uniform", "eval_rounds": 2},
    ],
    ids=lambda settings: "-".join(str(value) if name == "method" else name for name, value in settings.items()),
)
def test_a_federation_gives_the_simulators_adapter(tmp_path, source, nodes, settings):
    recipe = federated.write_recipe(source, tmp_path, **settings)
    federated.simulate(recipe, tmp_path / "simulated")
    table = federated.federate(recipe, federated.LocalExchange(nodes), drawn=True)
    adapters = [federated.saved_adapter(tmp_path / name) for name in ("run", "simulated")]
    assert reference.max_difference(*adapters) < 1e-9
    # ffa_lora's A is sent once, which the simulator leaves out.
    beside = ["bytes_down"] if settings.get("method") == "ffa_lora" else []
    check_same_ledger(tmp_path / "run", tmp_path / "simulated", beside)
    assert len(table.splitlines()) > 3 and (tmp_path / "run" / "rounds.png").exists()


def test_updates_are_folded_in_the_simulators_order(tmp_path, source, nodes):
    """Ranks that do not ascend with the clients: sums of floating-point numbers then depend on the order."""
    settings = {"client_ranks": [6, 2, 4, 1], "clients_per_round": None, "server_optim": "sgd", "num_rounds": 2}
    recipe = federated.write_recipe(source, tmp_path, **settings)
    federated.simulate(recipe, tmp_path / "simulated")
    federated.federate(recipe, federated.LocalExchange(nodes))
    adapters = [federated.saved_adapter(tmp_path / name) for name in ("run", "simulated")]
    assert reference.max_difference(*adapters) == 0.0


@pytest.fixture
def recipe(source, tmp_path):
    return federated.write_recipe(source, tmp_path, clients_per_round=None, server_optim="sgd")


def faulty(node, change, rounds=(1,)):
    """A node whose update of these rounds is what `change` makes of it."""

    def answer(packet):
        good = node(packet)
        if packet.kind != "train" or packet.header["round"] not in rounds:
            return good
        return change(good)

    return answer


def with_tensor(make):
    def change(packet):
        name = min(packet.tensors)
        return Packet(packet.header, {**packet.tensors, name: make(packet.tensors[name])})

    return change


FAULTS = {
    "nan": (with_tensor(lambda x: x * np.nan), "the update is not finite"),
    "infinity": (with_tensor(lambda x: x + np.inf), "the update is not finite"),
    "shape": (with_tensor(lambda x: x[:, :-1]), "of shape"),
    "dtype": (with_tensor(lambda x: x.astype(np.float16)), "as float16, not float64"),
    "norm": (with_tensor(lambda x: x + 1e9), "is beyond the bound of 1000"),
    "lacks": (lambda p: Packet(p.header, dict(list(p.tensors.items())[1:])), "the update lacks"),
    "surplus": (lambda p: Packet(p.header, {**p.tensors, "A.other": np.ones(2)}), "A.other, which was not asked for"),
    "round": (lambda p: Packet({**p.header, "round": 0}, p.tensors), "the update is of round 0"),
    "failed": (lambda p: Packet({"kind": "failed", "reason": "out of memory"}), "out of memory"),
    "kind": (lambda p: Packet({"kind": "other"}), "a packet of kind other"),
    "no packet": (lambda p: "the node answered with an error: boom", "boom"),
    "silent": (lambda p: None, "it did not answer within 0.2 s"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_not_sound_is_left_out_told_and_asked_for_again(tmp_path, recipe, nodes, fault):
    change, reason = FAULTS[fault]
    nodes[102] = faulty(nodes[102], change)
    exchange = federated.LocalExchange(nodes)
    federated.federate(recipe, exchange, max_update_norm=1000.0)
    rounds = ledger(tmp_path / "run")
    assert [len(line["refused"]) for line in rounds] == ([0, 1, 1] if fault == "silent" else [0, 1, 0])
    (refused,) = rounds[1]["refused"]
    assert refused["client_id"] == 2 and reason in refused["reason"]
    assert rounds[1]["weights"] == pytest.approx([1 / 3, 1 / 3, 0, 1 / 3])
    assert sum(rounds[2]["weights"]) == pytest.approx(1)
    asked = [packet for node, packet in exchange.sent if node == 102 and packet.kind == "train"]
    if fault == "silent":  # left in peace for a round; the bytes that went nowhere are not counted
        assert rounds[2]["refused"][0]["reason"] == "it missed its last deadline; it is asked again in round 3"
        assert len(asked) == 2 and rounds[1]["bytes_up"] < rounds[0]["bytes_up"] == rounds[0]["bytes_down"]
        assert rounds[2]["bytes_down"] == rounds[2]["bytes_up"]
    else:
        assert [packet.header["notice"] for packet in asked] == [None, None, refused["reason"]]
    assert all(math.isfinite(value) for pair in federated.saved_adapter(tmp_path / "run").values()
               for half in pair for value in (half.min().item(), half.max().item()))  # fmt: skip


@pytest.mark.parametrize("loss", ["much", None, True, [1.0], "nan", 1e999, 10**400])
def test_a_loss_that_is_no_number_is_none_in_the_ledger(tmp_path, recipe, nodes, loss):
    nodes[102] = faulty(nodes[102], lambda packet: Packet({**packet.header, "loss": loss}, packet.tensors))
    federated.federate(recipe, federated.LocalExchange(nodes))
    lines = ledger(tmp_path / "run")
    assert lines[1]["losses"][2] is None and None not in lines[0]["losses"] + lines[1]["losses"][:2]
    assert [line["refused"] for line in lines] == [[], [], []]


def test_a_round_without_a_client_is_the_simulators_that_refuses_it(tmp_path, recipe, nodes, monkeypatch):
    """The others' weights are renormalised, and nothing else changes."""
    nodes[102] = faulty(nodes[102], lambda packet: None, rounds=(0, 1, 2))
    federated.federate(recipe, federated.LocalExchange(nodes))

    def refuse_third(update):
        if update.position == 2:
            raise RefusedUpdate("of the test")
        return update

    federated.take_by(monkeypatch, refuse_third)
    federated.simulate(recipe, tmp_path / "simulated")
    adapters = [federated.saved_adapter(tmp_path / name) for name in ("run", "simulated")]
    assert reference.max_difference(*adapters) < 1e-9


def test_no_adapter_or_update_outlives_its_round_at_a_node(tmp_path, recipe, nodes):
    """They are as large as adapters, and a node may wait for its next round for long."""
    before = alive()
    federated.federate(recipe, federated.LocalExchange(nodes))
    assert len(alive()) == len(before)


def alive() -> list:
    gc.collect()
    return [each for each in gc.get_objects() if isinstance(each, (ClientAdapter, ClientUpdate))]


def test_too_few_updates_end_the_run_with_every_whole_round_kept(tmp_path, recipe, nodes):
    federated.simulate(recipe, tmp_path / "simulated")
    broken = {number: faulty(node, FAULTS["nan"][0], rounds=(2,)) for number, node in nodes.items()}
    with pytest.raises(FederationError, match="at least min-clients=2 clients in round 2 .* found 0 .client 0: the"):
        federated.federate(recipe, federated.LocalExchange(broken), min_clients=2)
    assert [line["round"] for line in ledger(tmp_path / "run")] == [0, 1]
    clients = json.loads((tmp_path / "run" / "federation.json").read_text())["clients"]
    assert [(one["client_id"], one["examples"]) for one in clients] == [(0, 10), (1, 9), (2, 9), (3, 9)]
    (checkpoint,) = (tmp_path / "run").glob("checkpoint-*")
    assert json.loads((checkpoint / "federated_state.json").read_text())["round"] == 2
    federated.federate(recipe, federated.LocalExchange(nodes), min_clients=2, resume=True)
    adapters = [federated.saved_adapter(tmp_path / name) for name in ("run", "simulated")]
    assert reference.max_difference(*adapters) < 1e-9
    check_same_ledger(tmp_path / "run", tmp_path / "simulated")


def test_what_ended_a_run_is_told_although_its_last_round_cannot_be_saved(
    tmp_path, recipe, nodes, caplog, monkeypatch
):
    broken = {number: faulty(node, FAULTS["nan"][0], rounds=(2,)) for number, node in nodes.items()}

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fslora_hf.trainers.checkpoints.whole_folder", full)
    with pytest.raises(FederationError, match="found 0"):
        federated.federate(recipe, federated.LocalExchange(broken))
    assert "The last whole round could not be saved" in caplog.text and "No space left" in caplog.text


def test_a_round_waits_for_nodes_that_come_back_in_time(tmp_path, recipe, nodes):
    """All have gone when round 1 begins; the run goes on with them, and ends as the simulator's."""
    federated.simulate(recipe, tmp_path / "simulated")
    exchange, looks = federated.LocalExchange(nodes), []

    def connected():
        rounds = [packet.header["round"] for _, packet in exchange.sent if packet.kind == "train"]
        away = rounds.count(0) == 4 and not rounds.count(1) and len(ledger_lines(tmp_path / "run")) == 1
        looks.append(away)
        return set() if away and sum(looks) < 5 else set(nodes)

    exchange.nodes = connected
    federated.federate(recipe, exchange, min_clients=4, round_deadline_s=20.0)
    assert sum(looks) >= 5
    adapters = [federated.saved_adapter(tmp_path / name) for name in ("run", "simulated")]
    assert reference.max_difference(*adapters) < 1e-9
    check_same_ledger(tmp_path / "run", tmp_path / "simulated")


def ledger_lines(folder):
    return (folder / "rounds.jsonl").read_text().splitlines() if (folder / "rounds.jsonl").exists() else []


def test_a_side_that_is_not_trained_is_sent_until_it_has_come(tmp_path, source, nodes):
    """Of ffa_lora's A: the first part of a node that stays silent is lost, and so is the A in it."""
    recipe = federated.write_recipe(source, tmp_path, method="ffa_lora", clients_per_round=None, num_rounds=4, **FULL)
    sound, lost = nodes[101], []

    def deaf_at_first(packet):
        if packet.kind == "train" and not lost:
            return lost.append(packet)  # and so no answer
        return sound(packet)

    nodes[101] = deaf_at_first
    exchange = federated.LocalExchange(nodes)
    federated.federate(recipe, exchange)
    asked = [packet for node, packet in exchange.sent if node == 101 and packet.kind == "train"]
    assert [any(name.startswith("A.") for name in packet.tensors) for packet in asked] == [True, True, False]
    assert [[one["client_id"] for one in line["refused"]] for line in ledger(tmp_path / "run")] == [[1], [1], [], []]


def test_a_run_that_is_not_resumed_leaves_another_as_it_is(tmp_path, recipe, nodes):
    exchange = federated.LocalExchange(nodes)
    federated.federate(recipe, exchange)
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    others = federated.LocalExchange(dict(list(exchange.nodes_by_number.items())[:3]))
    with pytest.raises(ValueError, match="found rounds.jsonl.* resume that run with resume=true in --run-config, or"):
        federated.federate(recipe, others)
    assert not others.sent
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}


def test_a_node_that_was_started_anew_rejoins(tmp_path, recipe, nodes):
    """Unseen by the exchange, as when it comes back at once under its old number, and seen, under another."""
    federated.simulate(recipe, tmp_path / "simulated")
    exchange = federated.LocalExchange(nodes)
    fresh = federated.make_nodes(tmp_path, clients=[1, 2])
    original = nodes[103]

    def restart_others(packet):
        if packet.kind == "train" and packet.header["round"] == 0:
            exchange.nodes_by_number[101] = fresh[101]
            del exchange.nodes_by_number[102]
            exchange.nodes_by_number[202] = fresh[102]
        return original(packet)

    exchange.nodes_by_number[103] = restart_others
    federated.federate(recipe, exchange)
    rounds = ledger(tmp_path / "run")
    assert [[one["client_id"] for one in line["refused"]] for line in rounds] == [[], [1], []]
    assert "started anew" in rounds[1]["refused"][0]["reason"]


def slow_to_join(exchange, nodes=None):
    """Invitations are answered when they have been asked for three times, as of a node that loads its model."""
    receive, looks = exchange.receive, {}

    def late(tickets):
        for ticket in tickets:
            looks[ticket] = looks.get(ticket, 0) + 1
        joins = {ticket for ticket in tickets if exchange.sent[ticket][1].kind == "join"}
        return receive([ticket for ticket in tickets if ticket not in joins or looks[ticket] > 2])

    exchange.receive = late
    return exchange


@pytest.mark.parametrize("method", [{"method": "flora"}, {"method": "ffa_lora", **FULL}], ids=["flora", "ffa_lora"])
def test_a_node_that_was_started_anew_unseen_trains_only_what_it_has_whole(tmp_path, source, method):
    """It answers that it has yet to join, and is not asked again until it has."""
    settings = {"clients_per_round": None, "num_rounds": 8, "server_optim": "sgd", "save_rounds": 1} | method
    recipe = federated.write_recipe(source, tmp_path, **settings)
    exchange = slow_to_join(federated.LocalExchange(federated.make_nodes(tmp_path)))
    fresh, kept = federated.make_nodes(tmp_path, clients=[1]), exchange.nodes_by_number[103]

    def restart_another(packet):
        if packet.kind == "train" and packet.header["round"] == 2:
            exchange.nodes_by_number[101] = fresh[101]
        return kept(packet)

    exchange.nodes_by_number[103] = restart_another
    federated.federate(recipe, exchange, join_deadline_s=20.0)
    reasons = [line["refused"][0]["reason"] if line["refused"] else None for line in ledger(tmp_path / "run")]
    assert reasons[:3] == [None] * 3 and "has yet to join this one" in reasons[3] and reasons[-1] is None
    assert set(reasons[4:-1]) <= {None, "its node is not connected"}
    if method["method"] == "flora":
        both = fresh[101], exchange.nodes_by_number[100]
        found, expected = (FoldedBase.of(node.__self__._trainer.model).weights for node in both)
        assert all(torch.equal(weight, expected[name]) for name, weight in found.items())


def test_nodes_that_join_another_run_between_rounds_join_this_one_again(tmp_path, recipe, nodes):
    """Their parts are of one recipe, which they are not trained with another of."""
    exchange, told = federated.LocalExchange(nodes), []
    kept = nodes[103]

    def invites(packet):
        answer = kept(packet)
        if packet.kind == "train" and packet.header["round"] == 0 and not told:
            (invitation, *_) = [sent for _, sent in exchange.sent if sent.kind == "join"]
            other = {"recipe": {**invitation.header["recipe"], "learning_rate": 1.0}, "session": "other"}
            told.extend(node(Packet({"kind": "join", **other})) for number, node in nodes.items() if number != 103)
        return answer

    exchange.nodes_by_number[103] = invites
    federated.federate(recipe, exchange)
    assert [answer.kind for answer in told] == ["joined"] * 3
    first, second, third = ledger(tmp_path / "run")
    assert [one["client_id"] for one in second["refused"]] == [0, 1, 2] and not first["refused"] + third["refused"]
    assert max(third["update_norms"]) < 3 * max(first["update_norms"])


@pytest.mark.parametrize(
    "where", ["fslora_hf.rounds.server.ServerState.step", "fslora_hf.trainers.callbacks.append_round"]
)
def test_a_round_that_is_not_whole_is_not_saved(tmp_path, recipe, nodes, monkeypatch, where):
    """An error within the server's step, or before the round is in the ledger: the run goes on from a whole round."""
    federated.simulate(recipe, tmp_path / "simulated")
    module, name = where.rsplit(".", 1)
    owner = ServerState if name == "step" else importlib.import_module(module)
    sound, calls = getattr(owner, name), []

    def breaks(*args):
        calls.append(args)
        if len(calls) == 2:
            raise RuntimeError("of the test")
        return sound(*args)

    monkeypatch.setattr(owner, name, breaks)
    with pytest.raises(RuntimeError, match="of the test"):
        federated.federate(recipe, federated.LocalExchange(nodes), overrides="--save_rounds 1")
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-1"]
    monkeypatch.undo()
    federated.federate(recipe, federated.LocalExchange(nodes), overrides="--save_rounds 1", resume=True)
    adapters = [federated.saved_adapter(tmp_path / name) for name in ("run", "simulated")]
    assert reference.max_difference(*adapters) < 1e-9
    check_same_ledger(tmp_path / "run", tmp_path / "simulated")


def test_an_asked_node_may_leave_while_a_round_waits_for_more(tmp_path, recipe, nodes):
    """Client 0 is asked, goes, and comes back as another node; the round has its update."""
    exchange, seen = federated.LocalExchange(nodes), []

    def connected():
        rounds = [packet.header["round"] for _, packet in exchange.sent if packet.kind == "train"]
        if rounds.count(1) == 0 and len(ledger_lines(tmp_path / "run")) == 1:
            return {100}  # when round 1 begins
        if rounds.count(1) and not seen:
            seen.append(exchange.nodes_by_number.pop(100))
            exchange._answers.clear()  # gone without one
            exchange.nodes_by_number[200] = seen[0]
        return set(exchange.nodes_by_number)

    exchange.nodes = connected
    federated.federate(recipe, exchange, min_clients=3, round_deadline_s=20.0)
    assert [len(line["refused"]) for line in ledger(tmp_path / "run")][1] <= 1
    assert [node for node, p in exchange.sent if p.kind == "train" and p.header["round"] == 1].count(200) == 1


@pytest.mark.parametrize("method", ["fslora", "flora"])
def test_numbers_whose_products_overflow_are_refused(tmp_path, source, nodes, method):
    recipe = federated.write_recipe(source, tmp_path, clients_per_round=None, server_optim="sgd", method=method)
    huge = {name: (lambda x: x * 0 + 1e100) for name in ("A", "B")}
    nodes[102] = faulty(nodes[102], lambda packet: Packet(packet.header, {
        name: huge[name[0]](tensor) for name, tensor in packet.tensors.items()}))  # fmt: skip
    federated.federate(recipe, federated.LocalExchange(nodes))
    refused = [{one["client_id"]: one["reason"] for one in line["refused"]} for line in ledger(tmp_path / "run")]
    assert list(refused[1]) == [2] and "is beyond the bound of 1e+06" in refused[1][2] and refused[2] == {}


def test_what_a_node_sends_beyond_its_update_counts_for_nothing(tmp_path, recipe, nodes):
    surplus = {"A.other": np.zeros(3_000_000 // 8)}
    nodes[102] = faulty(nodes[102], lambda packet: Packet(packet.header, {**packet.tensors, **surplus}))
    federated.federate(recipe, federated.LocalExchange(nodes), overrides="--upload_budget 1")
    lines = ledger(tmp_path / "run")
    assert len(lines) == 3 and lines[1]["bytes_up"] == lines[0]["bytes_up"]


def test_a_reason_of_any_length_is_cut(tmp_path, recipe, nodes):
    nodes[102] = faulty(nodes[102], lambda packet: Packet({"kind": "failed", "reason": "x" * 1_000_000}))
    federated.federate(recipe, federated.LocalExchange(nodes))
    assert len(ledger(tmp_path / "run")[1]["refused"][0]["reason"]) == LONGEST_REASON


def test_nothing_but_what_is_needed_crosses_the_wire(tmp_path, recipe, nodes):
    """No rows, no tokens, no other client's update, and of the global pair no more than the client's part."""
    exchange = federated.LocalExchange(nodes)
    federated.federate(recipe, exchange)
    ranks = federated.SETTINGS["client_ranks"]
    headers = {"train": {"protocol", "kind", "session", "round", "client_id", "rank", "scale", "notice"},
               "join": {"protocol", "kind", "session", "recipe"},
               "update": {"protocol", "kind", "round", "client_id", "loss"},
               "joined": {"protocol", "kind", "client_id", "rank", "examples", "standing"}}  # fmt: skip
    for node, packet in [*exchange.sent, *exchange.came]:
        assert set(packet.header) | {"protocol"} == headers[packet.kind]
        rank = ranks[node - 100]
        for name, tensor in packet.tensors.items():
            assert packet.kind in ("train", "update")
            assert tensor.shape[0 if name.startswith("A.") else 1] == rank and packet.header["client_id"] == node - 100
    (told, *_) = [packet.header["recipe"] for _, packet in exchange.sent if packet.kind == "join"]
    assert told["num_rounds"] == 3 and not {"output_dir", "client_ranks", "save_rounds"} & set(told)
    joined = [packet for _, packet in exchange.came if packet.kind == "joined"]
    assert set(joined[0].header["standing"]) == {"version", "base", "tokenizer", "configuration"}
    measured = {"train": 0, "update": 0}
    for packet in [p for _, p in exchange.sent + exchange.came if p.kind in measured and p.header["round"] == 1]:
        measured[packet.kind] += sum(tensor.nbytes for tensor in packet.tensors.values())
    line = ledger(tmp_path / "run")[1]
    assert (measured["train"], measured["update"]) == (line["bytes_down"], line["bytes_up"])


@pytest.mark.parametrize(
    "overrides, message",
    [
        ("--num_rounds 0", "num_rounds to be at least 1"),
        (
            "--resume_from_checkpoint true",
            "resume_from_checkpoint to be unset in a federation, found True: set resume=true",
        ),
        ("--clients_per_round 2", "Expected min-clients of at most clients_per_round=2, found 3"),
    ],
)
def test_what_a_federation_cannot_do_is_told_before_anything_is_loaded(recipe, overrides, message):
    exchange = federated.LocalExchange({})
    with pytest.raises(SettingsError, match=message):
        federated.federate(recipe, exchange, overrides=overrides, min_clients=3)


def test_rows_that_are_not_there_are_told_before_any_node_is_asked(tmp_path, recipe, nodes):
    """And are not needed where nodes have their own and the server evaluates nothing."""
    exchange = federated.LocalExchange(nodes)
    nowhere = f"--dataset {tmp_path / 'nowhere.jsonl'}"
    with pytest.raises(FileNotFoundError, match="Expected a file or folder of rows, found none at .*nowhere.jsonl"):
        federated.federate(recipe, exchange, overrides=f"{nowhere} --eval_rounds 1")
    assert not exchange.sent
    own = federated.make_nodes(tmp_path, [0, 1], data=str(next(tmp_path.parent.glob("source*/rows/train.jsonl"))))
    federated.federate(recipe, federated.LocalExchange(own), overrides=nowhere)
    assert ledger(tmp_path / "run")[-1]["clients"] == [0, 1]


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"recipe": ""}, "Expected recipe to be a YAML file"),
        ({"min_clients": 0}, "Expected min_clients to be at least 1, found 0"),
        ({"round_deadline_s": 0.0}, "Expected round_deadline_s to be above 0"),
        ({"max_update_norm": -1.0}, "Expected max_update_norm to be above 0"),
        ({"max_norm_ratio": 0.5}, "Expected max_norm_ratio to be above 1, or 0 for no bound"),
        ({"max_norm_ratio": float("nan")}, "Expected max_norm_ratio to be above 1, or 0 for no bound"),
    ],
)
def test_wrong_settings_of_a_federation_are_told(settings, message):
    from fslora_hf.federation.server import FederationArguments

    with pytest.raises(SettingsError, match=message):
        FederationArguments(**{"recipe": "some.yaml"} | settings)
