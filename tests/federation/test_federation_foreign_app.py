"""A node belongs to its owner: with real processes, no app that `flwr run` brings is run on it."""

import shutil
import subprocess
from pathlib import Path

import local  # recipes/federation/local.py
import psutil
import pytest

from tests.support import federated
from tests.support.warm_apps import warm_machine
from tests.support.worker_train import ledger

ROOT = Path(__file__).resolve().parents[2]
SECRETS = {"HF_TOKEN": "hf_of_the_node", "AWS_SECRET_ACCESS_KEY": "of the node", "FLWR_LICENSE_KEY": "of the node"}

pytest_plugins = ("tests.support.forked",)
pytestmark = pytest.mark.federation


def changed_app(folder: Path, marker: Path) -> Path:
    """A copy of the app with a line more in the ClientApp's file: it writes down that it was run, and where."""
    copy = shutil.copytree(ROOT / "recipes/federation/app", folder / "app")
    line = f"import os, pathlib; pathlib.Path({str(marker)!r}).write_text(repr(dict(os.environ)))\n"
    with open(copy / "federation_client.py", "a") as file:
        file.write(line)
    return copy


def environments(node: subprocess.Popen) -> dict[str, dict[str, str]]:
    """What each process that a node has started beside itself finds in its environment."""
    children = psutil.Process(node.pid).children(recursive=True)
    return {" ".join(child.cmdline()): child.environ() for child in children}


def test_a_node_runs_no_app_that_was_uploaded(server, tmp_path):
    """One that was changed does nothing on a node, whose own goes on answering; nor do its parts know a secret."""
    marker, recipes = tmp_path / "marker", []
    settings = {"num_clients": 2, "client_ranks": [2, 4], "clients_per_round": None, "num_rounds": 2}
    for name in ("changed", "honest"):
        source = federated.write_model_and_rows(tmp_path / name)
        recipes.append(federated.write_recipe(source, source, **settings))
    with warm_machine(server, tmp_path / "machine") as machine:
        machine.environment |= {"PYTHONPATH": str(ROOT)}
        machine.start_superlink()
        plain, machine.environment = machine.environment, machine.environment | SECRETS
        nodes = [machine.start_node(client) for client in range(2)]
        machine.environment = plain
        for recipe, app in zip(recipes, [changed_app(tmp_path, marker), local.HERE / "app"], strict=True):
            run = machine.run(str(recipe), [], stdout=subprocess.PIPE, app=app, clients=2, min_clients=2,
                              join_deadline_s=90.0, round_deadline_s=60.0)  # fmt: skip
            output = run.communicate(timeout=180)[0].decode()
            assert not marker.exists(), marker.read_text()
            assert [line["refused"] for line in ledger(recipe.parent / "run")] == [[], []], output
        found = [environments(node) for node in nodes]
    for one in found:
        assert sorted("messenger" in command for command in one) == [False, True]
        for command, variables in one.items():
            assert not SECRETS.keys() & variables.keys(), command
