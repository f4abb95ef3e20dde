"""Federations of real processes on loopback: a SuperLink, SuperNodes, and nodes that fail in every way.

One SuperLink and four nodes serve all runs of this file, so that what a run leaves behind meets the next.
"""

import contextlib
import json
import signal
import subprocess
import time
from pathlib import Path

import local  # recipes/federation/local.py
import psutil
import pytest

from fslora_hf.updates.part import RefusedUpdate
from tests.support import federated, reference
from tests.support.warm_apps import warm_machine
from tests.support.worker_train import check_same_ledger, ledger

ROOT = Path(__file__).resolve().parents[2]

pytest_plugins = ("tests.support.forked",)
pytestmark = pytest.mark.federation
NODE = ROOT / "tests/support/faulty_node.py"


class Federation:
    """A machine with four nodes, whose faults a test chooses. They and the ServerApps are forked with all imports
    done; tests/federation/test_federation_network.py has them as a user starts them."""

    def __init__(self, machine, folder: Path):
        self.machine, self.folder = machine, folder
        self.faults = folder / "faults.json"

    def start_node(self, client: int):
        return self.machine.start_node(client, script=NODE)

    def run(self, recipe: Path, *faults: dict, wait: bool = True, **settings):
        """Run a recipe; returns the run's output, or its process at once."""
        self.faults.write_text(json.dumps(faults))
        given = {"clients": 4, "min_clients": 2, "join_deadline_s": 120.0, "round_deadline_s": 60.0} | settings
        process = self.machine.run(str(recipe), [], stdout=subprocess.PIPE, **given)
        if not wait:
            return process
        output, _ = process.communicate(timeout=240)
        return output.decode()

    def server(self) -> psutil.Process:
        """The process that Flower has started for the run's ServerApp."""
        found = []
        for process in psutil.Process(self.machine.processes["superlink"].pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):  # of an earlier run, on its way out
                if any("flwr-serverapp" in part for part in process.cmdline()):
                    found.append(process)
        return found[-1]

    def log(self, name: str) -> str:
        return (self.machine.folder / f"{name}.log").read_text()


@pytest.fixture(scope="module")
def federation(server, tmp_path_factory):
    folder = tmp_path_factory.mktemp("federation")
    with warm_machine(server, folder / "machine") as machine:
        made = Federation(machine, folder)
        machine.environment |= {"PYTHONPATH": str(ROOT), "FSLORA_TEST_FAULTS": str(made.faults)}
        machine.start_superlink()
        for client in range(4):
            made.start_node(client)
        yield made


def make_recipe(tmp_path: Path, **settings) -> Path:
    source = federated.write_model_and_rows(tmp_path)
    return federated.write_recipe(source, tmp_path, clients_per_round=None, save_rounds=1, **settings)


def check_as_simulated(recipe: Path, tmp_path: Path) -> None:
    federated.simulate(recipe, tmp_path / "simulated")
    adapters = [federated.saved_adapter(tmp_path / name) for name in ("run", "simulated")]
    assert reference.max_difference(*adapters) < 1e-9
    check_same_ledger(tmp_path / "run", tmp_path / "simulated")


def refusals(folder: Path) -> list[dict[int, str]]:
    return [{one["client_id"]: one["reason"] for one in line["refused"]} for line in ledger(folder)]


def test_a_federation_of_processes_gives_the_simulators_adapter(tmp_path, federation):
    recipe = make_recipe(tmp_path, num_rounds=2)
    output = federation.run(recipe)
    assert "clients" in output, output
    check_as_simulated(recipe, tmp_path)
    for client in range(4):  # the model is loaded once a node, not once a message
        assert federation.log(f"node-{client}").count("Loading the model") == 1


def test_updates_that_are_not_sound_are_left_out(tmp_path, federation, monkeypatch):
    """At default settings; the adapter is that of the simulator's run in which the same updates are refused."""
    recipe = make_recipe(tmp_path, num_rounds=4, server_optim="sgd")
    faults = [{"client": 1, "round": 0, "fault": "nan"}, {"client": 2, "round": 1, "fault": "shape"},
              {"client": 3, "round": 2, "fault": "norm"}, {"client": 0, "round": 0, "fault": "poison"}]  # fmt: skip
    federation.run(recipe, *faults)
    first, second, third, fourth = refusals(tmp_path / "run")
    assert list(first) == [0, 1] and first[1] == "the update is not finite" and fourth == {}
    assert "the norm of the update, 9.9e+05, is beyond the bound of" in first[0] and "max-norm-ratio" in first[0]
    assert list(second) == [2] and "of shape" in second[2]
    assert list(third) == [3] and "beyond the bound of 1e+06" in third[3]
    assert "The last update was left out because the update is not finite." in federation.log("node-1")
    assert f"The last update was left out because {first[0]}." in federation.log("node-0")
    seen = []

    def refuse(update):
        seen.append(update.position)
        if (update.position, seen.count(update.position) - 1) in {(one["client"], one["round"]) for one in faults}:
            raise RefusedUpdate("of the test")
        return update

    federated.take_by(monkeypatch, refuse)
    federated.simulate(recipe, tmp_path / "simulated")
    adapters = [federated.saved_adapter(tmp_path / name) for name in ("run", "simulated")]
    assert reference.max_difference(*adapters) < 1e-9


def test_a_node_that_stalls_is_not_waited_for(tmp_path, federation):
    recipe = make_recipe(tmp_path, num_rounds=4)
    federation.run(recipe, {"client": 2, "round": 1, "fault": "stall", "seconds": 40}, round_deadline_s=25.0)
    rounds = refusals(tmp_path / "run")
    assert len(rounds) == 4 and rounds[0] == rounds[3] == {}
    assert rounds[1] == {2: "it did not answer within 25 s"}
    assert rounds[2] == {2: "it missed its last deadline; it is asked again in round 3"}


def test_a_node_that_is_killed_comes_back(tmp_path, federation):
    recipe = make_recipe(tmp_path, num_rounds=7)
    back = tmp_path / "back"  # the round after it waits until then, however long a node takes to start here
    faults = [{"client": 3, "round": 1, "fault": "kill"},
              {"client": 0, "round": 2, "fault": "stall", "seconds": 120, "until": str(back)}]  # fmt: skip
    run = federation.run(recipe, *faults, wait=False, round_deadline_s=150.0)
    killed = federation.machine.processes["node-3"]
    killed.wait(120)
    assert killed.returncode == -signal.SIGKILL
    before = federation.log("node-3").count("SuperNode ID")
    federation.start_node(3)
    wait_for(lambda: federation.log("node-3").count("SuperNode ID") > before)
    back.touch()
    run.communicate(timeout=240)
    rounds = refusals(tmp_path / "run")
    assert len(rounds) == 7 and rounds[0] == {} and list(rounds[1]) == [3]
    assert rounds[-1] == {}, rounds


def test_a_server_that_is_killed_resumes_with_its_nodes_still_up(tmp_path, federation):
    recipe = make_recipe(tmp_path, num_rounds=2)
    loaded = [federation.log(f"node-{client}").count("Loading the model") for client in range(4)]
    run = federation.run(recipe, {"client": 0, "round": 1, "fault": "stall", "seconds": 12}, wait=False)
    wait_for(lambda: (tmp_path / "run" / "rounds.jsonl").exists())
    time.sleep(2)
    federation.server().kill()
    run.communicate(timeout=120)
    assert len(ledger(tmp_path / "run")) == 1
    federation.run(recipe, resume=True)
    check_as_simulated(recipe, tmp_path)
    again = [federation.log(f"node-{client}").count("Loading the model") for client in range(4)]
    assert [after - before for after, before in zip(again, loaded, strict=True)] == [1] * 4


def test_a_superlink_that_is_started_anew_finds_its_nodes(tmp_path, federation):
    """The last of this file: whatever the old one knew is gone."""
    local.signal_group(federation.machine.processes["superlink"], signal.SIGKILL)
    federation.machine.processes["superlink"].wait()
    federation.machine.start_superlink()
    recipe = make_recipe(tmp_path, num_rounds=1)
    output = federation.run(recipe, join_deadline_s=150.0)
    (line,) = ledger(tmp_path / "run")
    assert line["clients"] == [0, 1, 2, 3] and line["refused"] == [], output


def wait_for(condition, seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.2)
