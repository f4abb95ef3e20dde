"""Seeded damage to what comes to a federation's server: the right result, or that one node refused in one line."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.numpy import save

from fslora_hf.federation.packet import Packet, PacketError
from fslora_hf.federation.reading import Reader
from fslora_hf.federation.roster import FederationError, Roster, read_roster
from fslora_hf.federation.sparse import pack
from fslora_hf.federation.standing import Standing
from fslora_hf.methods import ClientAdapter
from fslora_hf.updates.part import RefusedUpdate
from tests.support import federated
from tests.support.damage import damaged, damaged_json, variants
from tests.support.worker_train import ledger

LONGEST = 1500  # characters of a message


def check_line(text) -> None:
    """One line of printable characters, not too long."""
    assert str(text).isprintable() and 0 < len(str(text)) <= LONGEST, str(text)[:LONGEST]


# ---- Packets ----

HELD = ClientAdapter(
    {"m": torch.zeros(2, 5), "n": torch.zeros(2, 3)}, {"m": torch.zeros(4, 2), "n": torch.zeros(6, 2)}, 1.0
)
CLIENT = SimpleNamespace(client_id=3)
HEADER = {"kind": "update", "round": 7, "client_id": 3, "loss": 1.25}
RNG = np.random.default_rng(1)
TENSORS = {
    f"{side}.{module}": RNG.normal(size=tuple(tensor.shape)).astype(np.float32)
    for side in "AB"
    for module, tensor in getattr(HELD, side).items()
}


def blob_of(header: bytes, tensors) -> bytes:
    """A packet whose header is this text."""
    return save(dict(tensors), metadata={"header": header.decode("utf-8", "replace")})


def read(blob: bytes, share=None):
    """What the server makes of an answer's bytes: a Reply, or why there is none."""
    try:
        answer = Packet.from_bytes(blob)
    except PacketError as error:
        check_line(error)
        answer = str(error)
    try:
        return Reader(("A", "B"), share).read(answer, 7, CLIENT, HELD)
    except RefusedUpdate as refusal:
        check_line(refusal)
        return str(refusal)


def check_reply(reply) -> None:
    for side in "AB":
        for module, held in getattr(HELD, side).items():
            found = getattr(reply, side)[module]
            assert found.shape == held.shape and found.dtype == held.dtype


@pytest.mark.parametrize("share", [None, 0.3], ids=["whole", "sparse"])
def test_damaged_updates_are_read_or_refused(share):
    tensors = TENSORS
    if share is not None:  # 11 of 36 numbers are kept
        least = np.sort(np.concatenate([np.abs(tensor).ravel() for tensor in TENSORS.values()]))[-11]
        tensors = pack({name: t * (np.abs(t) >= least) for name, t in TENSORS.items()}, share)
        assert set(tensors) == {"values", "mask"}
    whole = Packet(HEADER, tensors).to_bytes()
    check_reply(read(whole, share))
    found = [read(each.content, share) for each in variants("update.safetensors", whole, 11, 400)]
    header = json.dumps({"protocol": 1, **HEADER}).encode()
    found += [read(blob_of(damaged_json(header, 12, number).content, tensors), share) for number in range(300)]
    replies = [reply for reply in found if not isinstance(reply, str)]
    for reply in replies:
        check_reply(reply)
    assert 10 < len(replies) < len(found) - 300


# ---- Who joins ----

OWN = Standing("0.1.0", "b" * 64, "t" * 64, {"learning_rate": 0.01, "optim": "sgd", "targets": ["q", "v"]})


def joined(client):
    header = {"protocol": 1, "kind": "joined", "client_id": client, "examples": 3, "rank": 2}
    return json.dumps({**header, "standing": OWN.to_header()}).encode()


class Answering:
    """An exchange whose node 7 answers with these bytes, and whose node 8 is sound."""

    poll_seconds = 0.0

    def __init__(self, blob: bytes):
        self.answers, self.notices, self._blob = {}, [], blob

    def nodes(self):
        return {7, 8}

    def send(self, node, packet, seconds):
        if packet.kind == "turned_away":
            self.notices.append(packet.header["reason"])
        blob = self._blob if node == 7 else blob_of(joined(77777), {})
        try:
            self.answers[len(self.answers)] = Packet.from_bytes(blob)
        except PacketError as error:
            self.answers[len(self.answers)] = str(error)
        return len(self.answers) - 1

    def receive(self, tickets):
        return {ticket: self.answers[ticket] for ticket in tickets}


def test_damaged_answers_to_an_invitation_turn_away_that_node_alone(caplog):
    accepted = 0
    for number in range(600):
        exchange = Answering(blob_of(damaged_json(joined(0), 13, number).content, {}))
        roster = Roster(exchange, Packet({"kind": "join"}), OWN, 1.0, most_rank=4)
        roster.refresh()
        assert roster.members[77777].node == 8
        others = {client: member for client, member in roster.members.items() if client != 77777}
        accepted += len(others)
        assert bool(others) != (7 in roster.turned_away)
        for member in others.values():
            assert member.node == 7 and 1 <= member.examples <= 10_000_000 and member.rank in (None, 1, 2, 3, 4)
        for text in (*roster.turned_away.values(), *exchange.notices):
            check_line(text)
    for message in caplog.messages:
        check_line(message)
    assert 10 < accepted < 300


def test_a_damaged_roster_is_told_in_a_sentence(tmp_path):
    path, read_whole = tmp_path / "federation.json", 0
    clients = [{"client_id": number, "examples": 5 + number, "rank": None if number else 2} for number in range(3)]
    whole = json.dumps({"run": "0123456789abcdef", "clients": clients}, indent=1).encode()
    path.write_bytes(whole)
    _, expected = read_roster(path)
    assert [(m.client_id, m.examples, m.rank) for m in expected.values()] == [(0, 5, 2), (1, 6, None), (2, 7, None)]
    for each in variants("federation.json", whole, 14, 400):
        path.write_bytes(each.content)
        try:
            run, members = read_roster(path)
        except FederationError as error:
            check_line(error)
            assert "restore it from a backup" in str(error)
            continue
        read_whole += 1
        assert len(run) == 16 and all(member.node is None and member.examples > 0 for member in members.values())
    assert 5 < read_whole < 150


# ---- A whole run ----


def test_a_run_with_a_node_whose_every_answer_is_damaged_is_the_others(tmp_path):
    source = federated.write_model_and_rows(tmp_path)
    recipe = federated.write_recipe(
        source, tmp_path, clients_per_round=None, server_optim="sgd", num_rounds=20, local_steps=1
    )
    nodes = federated.make_nodes(tmp_path)
    sound, number = nodes[102], iter(range(0, 10_000, 7))

    def damaging(packet):
        answer = sound(packet)
        if packet.kind != "train":
            return answer
        damage = damaged("a.safetensors", answer.to_bytes(), 15, next(number))
        try:
            return Packet.from_bytes(damage.content)
        except PacketError as error:
            return str(error)

    nodes[102] = damaging
    federated.federate(recipe, federated.LocalExchange(nodes))
    lines = ledger(tmp_path / "run")
    assert len(lines) == 20
    for line in lines:
        assert {one["client_id"] for one in line["refused"]} <= {2}
        for one in line["refused"]:
            check_line(one["reason"])
