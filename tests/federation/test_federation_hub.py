"""A federation's server pushes its rounds and results to the Hub as the simulator does."""

import json
from pathlib import Path

import pytest

from fslora_hf.federation.roster import FederationError
from tests.support import federated
from tests.support.hub_calls import WRITES
from tests.support.hub_runs import check_rounds
from tests.support.worker_train import ledger

pytest_plugins = ("tests.support.hub_client",)
pytestmark = pytest.mark.slow

HUB = {
    "server_optim": "sgd",
    "save_rounds": 1,
    "eval_rounds": 3,
    "push_to_hub": True,
    "push_rounds": 1,
    "hub_model_id": "user/run",
    "hub_token": WRITES,
    "hub_deadline": 20.0,
}


def federate(folder: str, breaks_in: int | None = None, **settings) -> str:
    """In the client's process: a federation on the recipe above; all that its nodes were told."""
    folder = Path(folder)
    source = folder / "source"
    if not source.exists():
        source.mkdir()
        federated.write_model_and_rows(source)
    nodes = federated.make_nodes(folder)

    def broken(node):
        def answer(packet):
            return None if packet.kind == "train" and packet.header["round"] == breaks_in else node(packet)

        return answer

    exchange = federated.LocalExchange({number: broken(node) for number, node in nodes.items()})
    try:
        federated.federate(federated.write_recipe(source, folder, **HUB), exchange, **settings)
    except FederationError:
        assert breaks_in is not None
    return json.dumps([dict(packet.header) for _, packet in exchange.sent])


def test_rounds_and_results_go_to_the_hub_and_the_token_to_nobody(hub, users, on_client, tmp_path):
    told = on_client(federate, str(tmp_path))
    check_rounds(hub, tmp_path / "run", rounds=(1, 2, 3))
    assert WRITES not in told and "hub" not in told
    files = hub.find("user/run").files("round-0003")
    assert len(files["rounds.jsonl"].splitlines()) == 3 and WRITES.encode() not in b"".join(files.values())
    card = files["README.md"].decode()
    assert "37 rows of 4 clients" in card
    assert "flwr run recipes/federation/app --run-config 'recipe=\"recipe-0.yaml\"'" in card
    assert "each client was a node of its own" in card and "simulated" not in card


def test_a_federation_that_was_broken_off_is_taken_up_on_the_hub_too(hub, users, on_client, tmp_path):
    on_client(federate, str(tmp_path), breaks_in=1)
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-1"]
    on_client(federate, str(tmp_path), resume=True)
    check_rounds(hub, tmp_path / "run", rounds=(1, 2, 3))
    assert [line["round"] for line in ledger(tmp_path / "run")] == [0, 1, 2]
