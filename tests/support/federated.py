"""A federation in one process: nodes that are objects, and an exchange that hands them packets."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from fslora_hf.config.recipe import build_settings
from fslora_hf.federation.node import Node, NodeSettings
from fslora_hf.federation.packet import Packet
from fslora_hf.federation.server import RECIPE_TYPES, FederationArguments, read_recipe, run_federation
from fslora_hf.launch import build_trainer, finish
from fslora_hf.updates.bounds import CheckFinite
from tests.support import reference, tiny

CLIENTS = 4
SETTINGS = {
    "dtype": "auto",  # float64, as it is saved
    "use_cpu": True,
    "bf16": False,
    "activation_checkpointing": False,
    "report_to": "none",
    "disable_tqdm": True,
    "lora_r": 6,
    "lora_alpha": 12,
    "lora_dropout": 0.0,
    "lora_target_modules": tiny.TARGETS,
    "partition": "iid",
    "num_clients": CLIENTS,
    "client_ranks": [1, 2, 4, 6],
    "num_rounds": 3,
    "clients_per_round": 3,
    "local_steps": 2,
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-2,
    "lr_scheduler_type": "linear",
    "max_grad_norm": 0.3,
    "server_optim": "adamw",
    "seed": 5,
    "save_rounds": 0,
}


def write_model_and_rows(folder: Path) -> Path:
    """The tiny model with its tokenizer, and rows to train and to evaluate on; returns the folder."""
    tiny.base_model(torch.float64).save_pretrained(folder / "model")
    tiny.tokenizer().save_pretrained(folder / "model")
    (folder / "rows").mkdir()
    for name, count in (("train", 37), ("test", 6)):
        texts = tiny.texts({0: count}, seed=count).remove_columns("client_id")
        (folder / "rows" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    return folder


def write_recipe(source: Path, folder: Path, **settings) -> Path:
    """A recipe on what `write_model_and_rows` wrote, for a run in `folder`; `settings` over those above, None to leave
    one out."""
    paths = {"model_name_or_path": source / "model", "dataset": source / "rows", "output_dir": folder / "run"}
    values = SETTINGS | {name: str(path) for name, path in paths.items()} | settings
    path = folder / f"recipe-{len(list(folder.glob('recipe-*')))}.yaml"
    path.write_text(yaml.safe_dump({name: value for name, value in values.items() if value is not None}))
    return path


class LocalExchange:
    """Hands packets to nodes as bytes, in this process.

    Attributes:
        nodes_by_number: what answers; a function of a Packet that returns one, or None to stay silent.
        sent: every packet that was sent, with its node.
        came: every answer.
    """

    poll_seconds = 0.01

    def __init__(self, nodes):
        self.nodes_by_number = dict(nodes)
        self.sent: list[tuple[int, Packet]] = []
        self.came: list[tuple[int, Packet]] = []
        self._answers: dict[int, Packet | str] = {}

    def nodes(self):
        return set(self.nodes_by_number)

    def send(self, node, packet, seconds):
        ticket = len(self.sent)
        self.sent.append((node, packet))
        answer = self.nodes_by_number[node](Packet.from_bytes(packet.to_bytes()))
        if isinstance(answer, Packet):
            answer = Packet.from_bytes(answer.to_bytes())
            self.came.append((node, answer))
        if answer is not None:
            self._answers[ticket] = answer
        return ticket

    def receive(self, tickets):
        return {ticket: self._answers.pop(ticket) for ticket in tickets if ticket in self._answers}


def make_nodes(folder: Path, clients=range(CLIENTS), **settings) -> dict:
    """Node 100 + c for client c, each a Node."""
    return {
        100 + client: Node(NodeSettings(client_id=client, folder=str(folder / f"node-{client}"), **settings)).answer
        for client in clients
    }


def federate(recipe: Path, exchange, *, drawn: bool = False, **settings) -> str:
    """Its report; the run's figure, which takes longer than a round, is an empty file unless it is `drawn`."""
    given = {"join_deadline_s": 0.2, "round_deadline_s": 0.2, "min_clients": 1} | settings
    with pytest.MonkeyPatch.context() as patched:
        if not drawn:
            patched.setattr("fslora_hf.launch.plot_ledger", lambda rounds, path, *args, **kwargs: path.touch())
        return run_federation(FederationArguments(recipe=str(recipe), **given), exchange)


def simulate(recipe: Path, output_dir: Path):
    """The same run in the simulator; its trainer."""
    values = read_recipe(FederationArguments(recipe=str(recipe), overrides=f"--output_dir {output_dir}"))
    trainer = build_trainer(*build_settings(RECIPE_TYPES, values))
    trainer.train()
    finish(trainer)
    return trainer


def take_by(monkeypatch, take) -> None:
    """Have a server hold updates to `take`, a function of an update, in place of the finite check."""
    monkeypatch.setattr(CheckFinite, "take", lambda part, round, client, update: take(update))


def saved_adapter(folder: Path) -> reference.Adapter:
    halves = load_file(folder / "adapter_model.safetensors")
    names = [name.removesuffix(".lora_A.weight") for name in halves if name.endswith(".lora_A.weight")]
    return {name: (halves[f"{name}.lora_A.weight"], halves[f"{name}.lora_B.weight"]) for name in names}
