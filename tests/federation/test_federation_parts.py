"""The parts of a federation on their own: packets, the link on a node, what must be equal, and who may join."""

import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from safetensors.numpy import save

from fslora_hf.federation import flower, link, server_app
from fslora_hf.federation.exchange import answers
from fslora_hf.federation.node import Node, NodeSettings
from fslora_hf.federation.packet import Packet, PacketError
from fslora_hf.federation.roster import FederationError, Roster
from fslora_hf.federation.server_app import FlowerExchange, read_run_config
from fslora_hf.federation.standing import Standing, digest_base, digest_tokenizer
from tests.support import federated, tiny

# ---- Packets ----


def test_a_packet_comes_out_as_it_went_in():
    tensors = {"A.x": np.arange(6.0).reshape(2, 3)[:, ::2], "B.x": np.float32([[1.5]]), "empty": np.zeros((0, 3))}
    packet = Packet({"kind": "train", "round": 3, "notice": None, "text": "é"}, tensors)
    again = Packet.from_bytes(packet.to_bytes())
    assert again.kind == "train" and dict(again.header) == {"protocol": 1, **packet.header}
    assert again.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert again.tensors[name].dtype == tensor.dtype
        np.testing.assert_array_equal(again.tensors[name], tensor)


def nested():
    """A header of so many lists within each other that no parser will follow."""
    return save({"x": np.zeros(1)}, metadata={"header": "[" * 100_000})


@pytest.mark.parametrize("blob", [b"", b"\0" * 7, b"x" * 100, Packet({}).to_bytes()[:-3] + b"}}}", nested])
def test_bytes_that_are_no_packet_are_told(blob):
    if callable(blob):
        blob = blob()
    with pytest.raises(PacketError, match="Expected a packet, found bytes that cannot be read"):
        Packet.from_bytes(blob)


def test_another_protocol_is_told(monkeypatch):
    monkeypatch.setattr("fslora_hf.federation.packet.PROTOCOL", 7)
    blob = Packet({"kind": "join"}).to_bytes()
    monkeypatch.undo()
    with pytest.raises(PacketError, match="Expected packets of protocol 1, found 7: use the same fslora_hf"):
        Packet.from_bytes(blob)


# ---- The link ----


def test_packets_reach_the_process_that_holds_the_model():
    with tempfile.TemporaryDirectory() as folder:
        path, stop = f"{folder}/link/socket", threading.Event()

        def alive():
            if stop.is_set():
                raise KeyboardInterrupt

        def serve():
            with pytest.raises(KeyboardInterrupt):
                link.serve(path, lambda packet: packet[::-1], alive)

        thread = threading.Thread(target=serve)
        thread.start()
        end = time.monotonic() + 10
        while not os.path.exists(path) and time.monotonic() < end:
            time.sleep(0.01)
        large = os.urandom(3_000_000)
        assert link.ask(path, b"abc") == b"cba" and link.ask(path, large) == large[::-1] and link.ask(path, b"") == b""
        assert os.stat(f"{folder}/link").st_mode & 0o077 == 0
        stop.set()
        thread.join(10)
        with pytest.raises(link.LinkError, match="it has ended; start the node anew"):
            link.ask(path, b"abc")


def test_a_folder_that_others_may_enter_is_refused():
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        with pytest.raises(link.LinkError, match="to be its owner's alone, found it open to others"):
            link.serve(f"{folder}/socket", bytes, alive=lambda: pytest.fail("It serves."))


def test_what_passes_packets_on_loads_no_torch():
    """With a Flower that lacks a part that it needs, it says so in place of running anything."""
    part = "flwr.supernode.runtime.run_clientapp"
    code = f"""
import sys
sys.modules["{part}"] = None
try:
    import fslora_hf.federation.messenger
except ImportError as error:
    print(error)
del sys.modules["{part}"]
import fslora_hf.federation.messenger
print('torch' in sys.modules)
"""
    root = str(Path(__file__).resolve().parents[2])
    here = {**os.environ, "PYTHONPATH": root}
    done = subprocess.run([sys.executable, "-c", code], env=here, capture_output=True, text=True)
    refused, loaded = done.stdout.splitlines()
    assert loaded == "False", done.stderr
    assert re.match(r"Expected flwr as in constraints.txt, found 1\.[\d.]+, of which .*pip install -c", refused), (
        refused
    )


# ---- A node's start ----


def start_node(*options):
    """What recipes/federation/node.py says to options that it cannot work with."""
    root = Path(__file__).resolve().parents[2]
    command = [
        sys.executable,
        str(root / "recipes/federation/node.py"),
        "--client_id",
        "0",
        "--superlink",
        "localhost:1",
    ]
    here = {**os.environ, "PYTHONPATH": str(root)}
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    done = subprocess.run([*command, "--port", port, *options], env=here, capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    return done.stderr


def test_what_a_node_cannot_work_with_is_told_when_it_starts(tmp_path):
    nowhere = str(tmp_path / "nowhere")
    assert f"Expected --private_key to be a file, found none at {nowhere}" in start_node("--private_key", nowhere)
    assert "Expected --root_certificates to be a file" in start_node("--root_certificates", nowhere)
    assert f"Expected a file or folder of rows, found none at {nowhere}" in start_node("--data", nowhere)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert f"Expected port {port} to be free for this node's SuperNode, found it in use" in start_node(
            "--port", port
        )


def test_a_node_of_too_large_a_rank_is_told_by_itself(tmp_path, caplog):
    recipe = federated.write_recipe(federated.write_model_and_rows(tmp_path), tmp_path)
    exchange = federated.LocalExchange(federated.make_nodes(tmp_path, [3], rank=7))
    message = "Expected --rank of at most lora_r=6, found 7: start the node with a lower one"
    with pytest.raises(FederationError, match=f"client 3: The run cannot start: - {message}"):
        federated.federate(recipe, exchange)
    assert message in caplog.text and "Traceback" not in caplog.text


# ---- Flower ----


@pytest.mark.parametrize("found, message", [(None, "Expected flwr 1, found none"), ("2.0.1", "found 2.0.1")])
def test_another_flower_is_told(monkeypatch, found, message):
    def version(name):
        if found is None:
            raise PackageNotFoundError(name)
        return found

    monkeypatch.setattr(flower, "version", version)
    with pytest.raises(ImportError, match=f"{message}: pip install 'fslora_hf.flower.'"):
        flower.check_flower()


def test_settings_are_read_as_flower_gives_them():
    read = read_run_config({"recipe": "r.yaml", "overrides": "", "clients": 0, "min-clients": 2,
                            "max-update-norm": 0.0, "round-deadline-s": 5.0, "resume": False})  # fmt: skip
    assert (read.recipe, read.overrides, read.clients, read.min_clients) == ("r.yaml", "", None, 2)
    assert (read.max_update_norm, read.round_deadline_s, read.join_deadline_s, read.resume) == (
        1e6,
        5.0,
        600.0,
        False,
    )
    assert read.max_norm_ratio == 10 and read_run_config({"recipe": "r", "max-norm-ratio": 0.0}).max_norm_ratio == 0


def test_nobody_waits_for_a_node_that_has_left():
    """One answers and leaves, one leaves, one is silent."""
    silent = dict.fromkeys((8, 9), lambda packet: None)
    exchange = federated.LocalExchange({7: lambda packet: Packet({"kind": "noted"}), **silent})
    tickets = {node: exchange.send(node, Packet({"kind": "ping"}), 1.0) for node in (7, 8, 9)}
    exchange.nodes_by_number = {9: None}
    start = time.monotonic()
    found = dict(answers(exchange, {7: tickets[7], 8: tickets[8]}, 30.0))
    assert found[7].kind == "noted" and found[8] == "the node is no longer connected" and time.monotonic() - start < 5
    assert list(answers(exchange, {9: tickets[9]}, 0.05)) == [] and time.monotonic() - start >= 0.05


# ---- What must be equal ----


def test_a_base_is_known_by_its_weights_and_not_by_its_precision(tmp_path):
    digests = []
    for number, seed in enumerate((0, 0, 1)):
        folder = tmp_path / str(number)
        tiny.base_model(torch.float32, seed).save_pretrained(folder)
        config = json.loads((folder / "config.json").read_text())
        config |= {"dtype": "bfloat16", "transformers_version": "0"} if number == 1 else {}
        (folder / "config.json").write_text(json.dumps(config))
        digests.append(digest_base(str(folder)))
    assert digests[0] == digests[1] != digests[2]
    (tmp_path / "0" / "model.safetensors").unlink()
    with pytest.raises(OSError, match="Expected weights"):
        digest_base(str(tmp_path / "0"))


def test_a_model_of_the_hub_is_known_by_the_same_files(tmp_path, monkeypatch):
    tiny.base_model(torch.float32).save_pretrained(tmp_path)
    asked = []
    monkeypatch.setattr(
        "fslora_hf.federation.standing.snapshot_download",
        lambda name, revision, allow_patterns: asked.append((name, revision, allow_patterns)) or str(tmp_path),
    )
    assert digest_base("owner/model", "v1") == digest_base(str(tmp_path))
    assert asked == [("owner/model", "v1", ["config.json", "*.safetensors"])]


def test_a_tokenizer_is_known_by_what_it_does_and_not_by_what_it_was_last_used_for():
    first, used, other = tiny.tokenizer(), tiny.tokenizer(), tiny.tokenizer()
    used("w1 w2", max_length=1, truncation=True, padding="max_length")
    other.add_tokens(["new"])
    assert digest_tokenizer(first) == digest_tokenizer(used) != digest_tokenizer(other)
    templated = tiny.tokenizer()
    templated.chat_template = "{{ messages }}"
    assert digest_tokenizer(first) != digest_tokenizer(templated)


OWN = Standing("0.1.0", "b" * 64, "t" * 64, {"learning_rate": 0.01, "optim": "sgd"})


def joined(client, examples=3, rank=2, **standing):
    header = {"kind": "joined", "client_id": client, "examples": examples, "rank": rank}
    return Packet({**header, "standing": OWN.to_header() | standing})


def standing_as(standing):
    """An answer with this in place of a standing, or with a standing that differs in this."""
    if isinstance(standing, dict):
        return joined(0, **standing)
    return Packet({**joined(0).header, "standing": standing})


def roster_of(answers, **settings):
    """A roster, its exchange, and the exchange's nodes: number -> answer to the invitation."""
    nodes = {node: lambda packet, given=given: given if packet.kind == "join" else Packet({"kind": "noted"})
             for node, given in answers.items()}  # fmt: skip
    exchange = federated.LocalExchange(nodes)
    return Roster(exchange, Packet({"kind": "join"}), OWN, join_seconds=0.05, **settings), exchange


@pytest.mark.parametrize(
    "standing, message",
    [
        ({"base": "c" * 64}, "Expected the base model bbbbbbbbbbbbbbbb as on the server, found cccccccccccccccc"),
        ({"tokenizer": None}, "Expected the tokenizer tttttttttttttttt as on the server, found None"),
        ({"version": "0.2.0"}, "Expected fslora_hf 0.1.0 as on the server, found 0.2.0"),
        ({"configuration": {"optim": "sgd", "learning_rate": 0.5}}, "Expected learning_rate 0.01 as on the server, "
         "found 0.5"),
        (["base"], "Expected fslora_hf 0.1.0 as on the server, found None"),
        ({"configuration": None}, "Expected learning_rate 0.01 as on the server, found None"),
    ],
)  # fmt: skip
def test_a_node_that_differs_is_turned_away_and_told(standing, message):
    roster, exchange = roster_of({7: standing_as(standing), 8: joined(1)})
    roster.refresh()
    assert list(roster.members) == [1] and message in roster.turned_away[7]
    ((node, notice),) = [(node, packet) for node, packet in exchange.sent if packet.kind == "turned_away"]
    assert node == 7 and notice.header["reason"] == roster.turned_away[7]


@pytest.mark.parametrize(
    "client, examples, rank",
    [(-1, 3, 2), (True, 3, 2), (0, 0, 2), (0, 3, 0), ("0", 3, 2), (2**31, 3, 2), ([0], 3, 2), (0, 3.0, 2)],
)
def test_answers_that_make_no_sense_are_turned_away(client, examples, rank):
    roster, _ = roster_of({7: joined(client, examples, rank)})
    roster.refresh()
    assert not roster.members and "Expected a client from 0 on" in roster.turned_away[7]


FORGED = "boom\nWARNING Node 1 was turned away\x1b[2J\u202e" + "x" * 20_000


@pytest.mark.parametrize(
    "answer",
    [
        FORGED,
        Packet({"kind": "failed", "reason": FORGED}),
        Packet({"kind": "failed", "reason": {"deep": [FORGED] * 9}}),
        Packet({"kind": FORGED}),
        joined(0, version=FORGED, base=[FORGED] * 9, tokenizer=FORGED),
        joined(0, configuration={"optim": FORGED, FORGED: 1}),
        joined(0, configuration=OWN.configuration | {f"{number} {FORGED[:70]}": 0 for number in range(9000)}),
        Packet({**joined(0).header, "client_id": FORGED, "examples": [FORGED], "rank": 10**4000}),
        joined(0, examples=10**4000),
    ],
    ids=["text", "failed", "nested", "kind", "standing", "setting", "settings", "numbers", "examples"],
)
def test_what_a_node_says_is_one_short_line_and_told_once(monkeypatch, caplog, answer):
    """In the log, in the notice to the node and in the error that ends the wait."""
    monkeypatch.setattr("fslora_hf.federation.roster.INVITE_AGAIN_SECONDS", 0.0)
    roster, exchange = roster_of({7: answer})
    with pytest.raises(FederationError) as ended:
        roster.wait(1, 1, 0.1)
    (line,) = [message for message in caplog.messages if "Node 7" in message]
    notices = [packet.header["reason"] for _, packet in exchange.sent if packet.kind == "turned_away"]
    assert sum(packet.kind == "join" for _, packet in exchange.sent) > 1
    for text in (line, str(ended.value), *notices):
        assert text.isprintable() and len(text) < 1500
    roster._exchange.nodes_by_number[7] = lambda packet: joined(0, base="c")
    roster.refresh()
    roster.refresh()
    assert sum("Node 7" in message for message in caplog.messages) == 2  # another reason is told


def test_what_a_server_says_is_one_short_line_and_told_once(tmp_path, caplog):
    node = Node(NodeSettings(client_id=0, folder=str(tmp_path)))
    for _ in range(3):
        node.answer(Packet({"kind": "turned_away", "reason": FORGED}))
    for packet in (Packet({"kind": "join", "recipe": {FORGED: FORGED}}), Packet({"kind": "join"}),
                   Packet({"kind": "join", "recipe": {"method": f"{FORGED}:{FORGED}"}})):  # fmt: skip
        answer = node.answer(packet)
        assert answer.kind == "failed" and answer.header["reason"].isprintable()
        assert len(answer.header["reason"]) <= 400
    lines = [record.getMessage() for record in caplog.records if record.name.startswith("fslora_hf.federation")]
    assert sum("turned this node away" in line for line in lines) == 1
    for line in lines:
        first, *way = line.split("\n")
        assert first.isprintable() and len(first) < 1200 and not any("WARNING" in each for each in way)


def test_headers_beyond_a_recipe_are_no_packets():
    with pytest.raises(PacketError, match="a header of 1,048,.* characters, more than 1,048,576"):
        Packet.from_bytes(Packet({"kind": "x" * (1 << 20)}).to_bytes())


def test_answers_beyond_what_the_server_can_hold_are_turned_away():
    roster, _ = roster_of({7: joined(0, 10_000_001), 8: joined(1, rank=5), 9: joined(2, rank=4)}, most_rank=4)
    roster.refresh()
    assert list(roster.members) == [2]
    assert "Expected at most 10,000,000 examples, found 10,000,001" in roster.turned_away[7]
    assert "Expected a rank of at most lora_r=4, found 5: give the node a lower --rank" in roster.turned_away[8]


def test_too_few_nodes_end_the_wait_with_the_reasons(caplog):
    caplog.set_level("INFO", logger="fslora_hf")
    roster, _ = roster_of({7: joined(0, base="c"), 8: joined(1)})
    with pytest.raises(
        FederationError, match="at least min-clients=2 clients within 0.1 s, found 1 .node 7 was turned"
    ):
        roster.wait(3, 2, 0.1)
    assert "1 of 3 clients have joined; waiting" in caplog.text


def test_a_wait_ends_as_soon_as_all_are_there_and_at_the_deadline_with_enough():
    roster, exchange = roster_of({7: joined(0), 8: joined(1)})
    start = time.monotonic()
    roster.wait(2, 2, 30.0)
    assert time.monotonic() - start < 5
    roster.wait(3, 1, 0.1)
    assert sorted(roster.present()) == [0, 1] and len([p for _, p in exchange.sent if p.kind == "join"]) == 2


def test_who_could_not_join_is_invited_again_after_a_while(monkeypatch):
    """It may have been late, or be mended, without having left."""
    monkeypatch.setattr("fslora_hf.federation.roster.INVITE_AGAIN_SECONDS", 0.1)
    roster, exchange = roster_of({7: joined(0, base="c"), 8: "no answer in time", 9: joined(2)})
    roster.refresh()
    roster.refresh()
    assert list(roster.members) == [2] and sorted(roster.turned_away) == [7, 8]
    exchange.nodes_by_number[7] = exchange.nodes_by_number[8] = lambda packet: joined(1)
    exchange.nodes_by_number[7] = lambda packet: joined(0)
    time.sleep(0.15)
    roster.refresh()
    assert sorted(roster.members) == [0, 1, 2] and not roster.turned_away
    assert [node for node, packet in exchange.sent if packet.kind == "join"] == [7, 8, 9, 7, 8]


def test_a_message_that_flower_does_not_take_is_answered_with_why(monkeypatch):
    """As where the node has just left (None) or where the message is too large (nothing)."""

    class Grid:
        def __init__(self):
            self.given, self.pulled = [[None], [], ["1"]], []

        def push_messages(self, messages):
            return self.given.pop(0)

        def pull_messages(self, tickets):
            self.pulled.append(tickets)
            return []

    monkeypatch.setattr("fslora_hf.federation.server_app.Message", lambda *args, **kwargs: None)  # needs a run
    exchange = FlowerExchange(Grid())
    tickets = [exchange.send(5, Packet({"kind": "ping"}), 1.0) for _ in range(3)]
    assert tickets[2] == "1" and len(set(tickets)) == 3
    found = exchange.receive(tickets)
    assert found.keys() == set(tickets[:2]) and "could not be reached" in found[tickets[0]]
    assert exchange.receive(tickets[2:]) == {} and exchange._grid.pulled == [["1"], ["1"]]


@pytest.mark.parametrize(
    "reason, message",
    [
        (
            "Error: Message Unavailable - The requested message could not be found.",
            "time was over; if .* raise join-deadline-s",
        ),
        ("boom", "the node answered with an error: boom"),
    ],
)
def test_errors_of_flower_are_told_in_words_that_help(reason, message):
    reply = SimpleNamespace(has_error=lambda: True, error=SimpleNamespace(reason=reason))
    assert re.search(message, server_app._read(reply))


def test_a_node_answers_what_is_no_packet_of_its_protocol(tmp_path, monkeypatch):
    node = Node(NodeSettings(client_id=0, folder=str(tmp_path)))
    answer = Packet.from_bytes(node.answer_bytes(b"x"))
    assert answer.kind == "failed" and "Expected a packet" in answer.header["reason"]


def test_a_recipe_does_not_have_a_node_push_or_write_elsewhere(tmp_path, monkeypatch):
    monkeypatch.setattr("fslora_hf.trainers.pushing.find_target", lambda args: pytest.fail("It pushes."))
    source = federated.write_model_and_rows(tmp_path)
    values = yaml.safe_load(federated.write_recipe(source, tmp_path).read_text())
    values |= {"push_to_hub": True, "hub_model_id": "thief/x", "save_rounds": 1, "push_rounds": 1}
    node = Node(NodeSettings(client_id=0, folder=str(tmp_path / "node")))
    assert node.answer(Packet({"kind": "join", "session": "s", "recipe": values})).kind == "joined"
    assert node._trainer.args.output_dir == str(tmp_path / "node") and not (tmp_path / "run").exists()


def test_two_nodes_cannot_be_one_client():
    roster, exchange = roster_of({7: joined(0), 8: joined(0)})
    roster.refresh()
    assert roster.node_of(0) == 7
    assert "found client 0 on node 7 and on node 8" in roster.turned_away[8]
    assert [node for node, packet in exchange.sent if packet.kind == "ping"] == [7]


def test_a_node_that_is_silent_loses_its_client_to_one_that_is_not(monkeypatch):
    monkeypatch.setattr("fslora_hf.federation.roster.CLAIM_SECONDS", 0.05)
    roster, exchange = roster_of({7: joined(0)})
    roster.refresh()
    exchange.nodes_by_number = {7: lambda packet: None, 8: lambda packet: joined(0)}
    roster.refresh()
    assert roster.node_of(0) == 8 and not roster.turned_away


def test_a_run_keeps_its_clients(tmp_path):
    roster, exchange = roster_of({7: joined(5, 3, None), 8: joined(2, 4, 6)})
    roster.refresh()
    roster.close()
    assert roster.ranks(lambda client: 1) == [6, 1] and roster.owners().tolist() == [2] * 4 + [5] * 3
    with pytest.raises(FederationError, match="found none of client 5"):
        roster.ranks(lambda client: None)
    roster.save(tmp_path)
    del exchange.nodes_by_number[7], exchange.nodes_by_number[8]
    exchange.nodes_by_number |= {
        9: lambda p: joined(5, 3, None),
        10: lambda p: joined(2, 9, 6),
        11: lambda p: joined(6),
    }
    again = Roster(exchange, Packet({"kind": "join"}), OWN, join_seconds=0.05)
    assert again.restore(tmp_path)
    for one in (roster, again):
        one.refresh()
        assert one.node_of(5) == 9 and one.node_of(2) is None
        assert "Expected client 2 with 4 examples and rank 6 as when the run began" in one.turned_away[10]
        assert "the run that is under way, found client 6: join the next run" in one.turned_away[11]
    assert not Roster(exchange, Packet({}), OWN, 0.05).restore(tmp_path / "elsewhere")
