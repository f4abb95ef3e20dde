"""What crosses the wire of a federation of real processes: how many bytes, and who is let in."""

import contextlib
import json
import re
import select
import shlex
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import local  # recipes/federation/local.py
import psutil
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.support import federated
from tests.support.warm_apps import warm_machine
from tests.support.worker_train import ledger

ROOT = Path(__file__).resolve().parents[2]

pytest_plugins = ("tests.support.forked",)
pytestmark = pytest.mark.federation


class CountingProxy:
    """Passes connections on to a port of this machine and counts the bytes of each direction."""

    def __init__(self, port: int):
        self._target = port
        self.sent = self.received = 0  # by whoever connects here
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                threading.Thread(target=self._pass_on, args=(connection,), daemon=True).start()

    def _pass_on(self, near: socket.socket) -> None:
        with near, contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self._target)) as far:
            while True:
                for ready in select.select([near, far], [], [])[0]:
                    part = ready.recv(1 << 16)
                    if not part:
                        return
                    if ready is near:
                        self.sent += len(part)
                        far.sendall(part)
                    else:
                        self.received += len(part)
                        near.sendall(part)

    def close(self) -> None:
        self._listener.close()


def run_to_its_end(machine: local.Machine, recipe: Path, overrides: Sequence[str] = (), **settings) -> str:
    given = {"join_deadline_s": 90.0, "round_deadline_s": 60.0} | settings
    run = machine.run(str(recipe), list(overrides), stdout=subprocess.PIPE, **given)
    output, _ = run.communicate(timeout=180)
    return output.decode()


def test_bytes_at_the_socket_are_the_ledgers(tmp_path):
    """Of clients of ranks 4 and 64, in rounds; what comes beyond is Flower's envelope, polls, and tensors' names."""
    config = LlamaConfig(vocab_size=32, hidden_size=256, intermediate_size=512, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2, pad_token_id=0, eos_token_id=1)  # fmt: skip
    recipe = federated.write_recipe(
        federated.write_model_and_rows(tmp_path),
        tmp_path,
        dtype="float32",
        lora_r=64,
        num_clients=2,
        client_ranks=[4, 64],
        clients_per_round=None,
        num_rounds=3,
    )
    LlamaForCausalLM(config).to(torch.float32).save_pretrained(tmp_path / "model")
    with local.machine(tmp_path / "machine") as machine:
        machine.environment["PYTHONPATH"] = str(ROOT)
        machine.start_superlink()
        proxies = [CountingProxy(machine.port) for _ in range(2)]
        for client, proxy in enumerate(proxies):
            machine.start_node(client, "--superlink", f"127.0.0.1:{proxy.port}")
        output = run_to_its_end(machine, recipe, clients=2, min_clients=2)
        rounds = ledger(tmp_path / "run")
        assert len(rounds) == 3, output
        for rank, proxy in zip((4, 64), proxies, strict=True):
            told = sum(line["bytes_up"] for line in rounds) * rank / 68
            assert told == sum(line["bytes_down"] for line in rounds) * rank / 68
            beyond = {"sent": proxy.sent - told, "received": proxy.received - told}
            print(f"rank {rank}: {told:.0f} bytes each way in the ledger, beyond them {beyond}")
            assert all(0 < extra < 0.05 * told + 200_000 for extra in beyond.values()), (rank, told, beyond)
            proxy.close()


def test_a_run_that_cannot_be_says_why_and_that_it_failed(server, tmp_path):
    recipe = federated.write_recipe(federated.write_model_and_rows(tmp_path), tmp_path)
    with warm_machine(server, tmp_path / "machine") as machine:
        machine.environment["PYTHONPATH"] = str(ROOT)
        machine.start_superlink()
        output = run_to_its_end(machine, recipe, overrides=["--num_rounds", "0"])
        assert "Expected num_rounds to be at least 1, found 0" in output
        assert machine.outcome() == "finished:failed"


# ---- TLS and node authentication ----


def page_commands(begins: str) -> str:
    """The block of commands in docs/federation.md that begins so, for a server of the name localhost."""
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / "docs/federation.md").read_text(), flags=re.DOTALL)
    (found,) = [block for block in blocks if block.startswith(begins)]
    return found.replace("server.example.org", "localhost").replace("\\\n", " ")


def run_in(folder: Path, commands: str) -> None:
    folder.mkdir(exist_ok=True)
    subprocess.run(["bash", "-euc", commands], cwd=folder, check=True, capture_output=True)


def test_unknown_nodes_and_wrong_certificates_are_turned_away(server, tmp_path):
    """With the commands of docs/federation.md."""
    for folder in (tmp_path, tmp_path / "other"):
        run_in(folder, page_commands("openssl"))
    make_key, register = page_commands("ssh-keygen").splitlines()
    for name in ("known", "unknown", "wrong"):
        run_in(tmp_path, make_key.replace("node-3.key", name))
    superlink = [str(tmp_path / word) if re.search(r"\.(crt|key|db)$", word) else word
                 for word in shlex.split(page_commands("flower-superlink"))[1:]]  # fmt: skip
    recipe = federated.write_recipe(
        federated.write_model_and_rows(tmp_path),
        tmp_path,
        num_clients=3,
        client_ranks=[2, 2, 2],
        clients_per_round=None,
        num_rounds=1,
    )
    with warm_machine(server, tmp_path / "machine") as machine:
        machine.environment["PYTHONPATH"] = str(ROOT)
        machine.trust(tmp_path / "ca.crt")
        machine.start_superlink(*superlink)
        for name in ("known", "wrong"):
            machine.flwr(*shlex.split(register.replace("node-3.key", str(tmp_path / name)))[1:], "local")
        node_options = [word for word in shlex.split(page_commands("python recipes")) if word.startswith("--")]
        assert node_options == ["--client_id", "--data", "--superlink", "--root_certificates", "--private_key"]
        nodes = {}
        for client, (authority, key_name) in enumerate([("", "known"), ("", "unknown"), ("other", "wrong")]):
            options = ("--root_certificates", str(tmp_path / authority / "ca.crt"))
            options += ("--private_key", str(tmp_path / key_name))
            options += ("--patience_s", "0") if key_name == "unknown" else ()
            nodes[client] = machine.start_node(client, *options)
        output = run_to_its_end(machine, recipe, clients=3, min_clients=1, join_deadline_s=45.0)
        (line,) = ledger(tmp_path / "run")
        assert line["clients"] == [0] and line["refused"] == [], output
        assert json.loads((tmp_path / "run" / "federation.json").read_text())["clients"][0]["client_id"] == 0
        assert nodes[0].poll() is None
        nodes[1].wait(60)
        unknown = (machine.folder / "node-1.log").read_text()
        assert "Expected the SuperNode to stay, found that it ended" in unknown
        assert f"flwr supernode register {tmp_path / 'unknown'}.pub" in unknown
        wrong = (machine.folder / "node-2.log").read_text()
        assert "certificate" in wrong.lower() and "is ready with" not in wrong
        check_comes_back(machine, superlink, nodes[0])


def supernodes(node: subprocess.Popen) -> list[psutil.Process]:
    """Those that a node has started."""
    found = []
    for child in psutil.Process(node.pid).children():
        with contextlib.suppress(psutil.Error):  # one that is on its way out
            found += [child] * any("flower-supernode" in part for part in child.cmdline())
    return found


def check_comes_back(machine, superlink: Sequence[str], node: subprocess.Popen) -> None:
    """As after a power cut: a SuperLink that is started with the same database knows the node's key, and takes the
    dead SuperNode for online, as which it does not let the new one in, until it has missed it for long enough."""
    (killed,) = supernodes(node)
    killed.kill()
    local.signal_group(machine.processes["superlink"], signal.SIGKILL)
    machine.processes["superlink"].wait()
    machine.start_superlink(*superlink)
    end, log = time.monotonic() + 200, machine.folder / "node-0.log"
    while time.monotonic() < end:
        time.sleep(2)
        assert node.poll() is None
        if any(time.time() - child.create_time() > 25 for child in supernodes(node) if child.pid != killed.pid):
            break
    else:
        raise AssertionError(log.read_text()[-3000:])
    assert "is started anew" in log.read_text() and "It is tried again in 15 s." in log.read_text()
    nodes = json.loads(machine.flwr("supernode", "list", "local", "--format", "json"))["nodes"]
    assert sorted(one["status"] for one in nodes) == ["online", "registered"]
