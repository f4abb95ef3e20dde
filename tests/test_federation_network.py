"""What crosses the wire of a federation of real processes: how many bytes, and who is let in."""

import contextlib
import datetime
import ipaddress
import json
import select
import socket
import subprocess
import threading
from collections.abc import Sequence
from pathlib import Path

import local  # recipes/federation/local.py
import pytest
import torch
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from transformers import LlamaConfig, LlamaForCausalLM

from tests import federated
from tests.worker_train import ledger

ROOT = Path(__file__).resolve().parents[1]

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


def test_a_run_that_cannot_be_says_why_and_that_it_failed(tmp_path):
    recipe = federated.write_recipe(federated.write_model_and_rows(tmp_path), tmp_path)
    with local.machine(tmp_path / "machine") as machine:
        machine.environment["PYTHONPATH"] = str(ROOT)
        machine.start_superlink()
        output = run_to_its_end(machine, recipe, overrides=["--num_rounds", "0"])
        assert "Expected num_rounds to be at least 1, found 0" in output
        assert machine.outcome() == "finished:failed"


# ---- TLS and node authentication ----


def make_authority(folder: Path, name: str) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    key = ec.generate_private_key(ec.SECP384R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    certificate = _certificate(subject, subject, key.public_key()).add_extension(
        x509.BasicConstraints(ca=True, path_length=None), critical=True
    )
    signed = certificate.sign(key, hashes.SHA256())
    (folder / f"{name}.crt").write_bytes(signed.public_bytes(serialization.Encoding.PEM))
    return signed, key


def make_server(folder: Path, authority: x509.Certificate, authority_key: ec.EllipticCurvePrivateKey) -> None:
    key = ec.generate_private_key(ec.SECP384R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    names = x509.SubjectAlternativeName([x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    signed = _certificate(subject, authority.subject, key.public_key()).add_extension(names, critical=False)
    certificate = signed.sign(authority_key, hashes.SHA256())
    (folder / "server.crt").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    (folder / "server.key").write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )


def _certificate(subject: x509.Name, issuer: x509.Name, public_key) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=2))
    )


def make_node_key(path: Path) -> None:
    """As `ssh-keygen -t ecdsa -b 384` does."""
    key = ec.generate_private_key(ec.SECP384R1())
    form = serialization.PrivateFormat.OpenSSH
    path.write_bytes(key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption()))
    public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    Path(f"{path}.pub").write_bytes(public)


def test_unknown_nodes_and_wrong_certificates_are_turned_away(tmp_path):
    authority, key = make_authority(tmp_path, "ca")
    make_authority(tmp_path, "other")
    make_server(tmp_path, authority, key)
    for name in ("known", "unknown", "wrong"):
        make_node_key(tmp_path / name)
    recipe = federated.write_recipe(
        federated.write_model_and_rows(tmp_path),
        tmp_path,
        num_clients=3,
        client_ranks=[2, 2, 2],
        clients_per_round=None,
        num_rounds=1,
    )
    with local.machine(tmp_path / "machine") as machine:
        machine.environment["PYTHONPATH"] = str(ROOT)
        machine.trust(tmp_path / "ca.crt")
        machine.start_superlink(
            *("--ssl-ca-certfile", str(tmp_path / "ca.crt"), "--ssl-certfile", str(tmp_path / "server.crt")),
            *("--ssl-keyfile", str(tmp_path / "server.key"), "--enable-supernode-auth"),
        )
        for name in ("known", "wrong"):
            machine.flwr("supernode", "register", str(tmp_path / f"{name}.pub"), "local")
        secure = {"known": ("ca", "known"), "unknown": ("ca", "unknown"), "wrong": ("other", "wrong")}
        nodes = {}
        for client, (authority_name, key_name) in enumerate(secure.values()):
            options = ("--root_certificates", str(tmp_path / f"{authority_name}.crt"))
            nodes[client] = machine.start_node(client, *options, "--private_key", str(tmp_path / key_name))
        output = run_to_its_end(machine, recipe, clients=3, min_clients=1, join_deadline_s=45.0)
        (line,) = ledger(tmp_path / "run")
        assert line["clients"] == [0] and line["refused"] == [], output
        assert json.loads((tmp_path / "run" / "federation.json").read_text())["clients"][0]["client_id"] == 0
        assert nodes[0].poll() is None
        nodes[1].wait(60)
        assert "Expected the SuperNode to stay, found that it ended" in (machine.folder / "node-1.log").read_text()
        wrong = (machine.folder / "node-2.log").read_text()
        assert "certificate" in wrong.lower() and "is ready with" not in wrong
