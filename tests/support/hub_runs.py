"""A run whose rounds go to the Hub, what of it runs in the client's process, and what the Hub must hold in the end."""

import hashlib
import json
from pathlib import Path

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import load_file

from fslora_hf.hub.outbox import OUTBOX_NAME, Outbox
from fslora_hf.hub.pusher import push_pending
from fslora_hf.hub.uploader import TRAILER, HubTarget
from tests.support.hub_calls import WRITES
from tests.support.worker_train import build

ROUNDS = (2, 4, 6)
RUN = {
    "num_rounds": 6,
    "clients_per_round": 2,
    "local_steps": 1,
    "client_ranks": [1, 2, 4, 6, 3],
    "save_rounds": 2,
    "push_to_hub": True,
    "push_rounds": 2,
    "hub_model_id": "user/run",
    "hub_token": WRITES,
    "hub_deadline": 20.0,
    "server_optim": "adam",
}
LORA = {"dropout": 0.1}


def train(folder: str, resume: str | bool | None = None, **changes) -> dict:
    """In the client's process: what became of the rounds, or what was refused."""
    try:
        trainer = build(folder, {**RUN, **changes}, LORA, dtype=torch.float32)
        trainer.train(resume_from_checkpoint=resume)
    except ValueError as error:
        return {"refused": str(error)}
    report = trainer.publisher and trainer.publisher.report
    return report and {"missing": report.missing, "table": str(report)}


def send(folder: str) -> list[int]:
    """In the client's process: what `recipes/push.py` does; the rounds that are still missing."""
    return push_pending(HubTarget("user/run", WRITES), Outbox(Path(folder) / OUTBOX_NAME)).missing


def check_same(tensors: dict[str, torch.Tensor] | Path, path: Path) -> None:
    """Bit for bit."""
    found, wanted = (each if isinstance(each, dict) else load_file(each) for each in (tensors, path))
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


def check_rounds(hub, folder: Path, rounds=ROUNDS, repo_id: str = "user/run") -> None:
    """Each round is one commit and one tag, with the weights of its checkpoint; the last is on main."""
    repository, outbox = hub.find(repo_id), Outbox(folder / OUTBOX_NAME)
    steps = {json.loads(p.read_text())["round"]: p.parent for p in folder.glob("checkpoint-*/federated_state.json")}
    commits = repository.log("main")
    for number in rounds:
        (commit,) = [commit for commit in commits if commit["title"] == f"Round {number}"]
        snapshot = outbox.get(number)
        assert snapshot.status == "pushed" and snapshot.commit == repository.resolve(snapshot.tag) == commit["id"]
        assert f"{TRAILER}{snapshot.digest}" in commit["message"]
        files = repository.files(snapshot.tag)
        assert snapshot.weights == hashlib.sha256(files["adapter_model.safetensors"]).hexdigest()
        check_same(load_tensors(files["adapter_model.safetensors"]), steps[number] / "adapter_model.safetensors")
    assert repository.resolve("main") == repository.resolve(f"round-{rounds[-1]:04d}")
    refs = [f"refs/tags/round-{number:04d}" for number in rounds]
    assert sorted(repository.refs()) == ["refs/heads/main", *refs]
    repository.git("fsck", "--strict", "--full")
