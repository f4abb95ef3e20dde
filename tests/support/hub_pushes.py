"""Rounds for tests to push, the calls that run in the client's process, and what the Hub must hold in the end."""

import contextlib
import logging
import time

from fslora_hf.hub.outbox import Outbox
from fslora_hf.hub.pusher import push_pending
from fslora_hf.hub.uploader import HubTarget, push_snapshot
from tests.support.hub_calls import WRITES

TARGET = HubTarget("user/run", WRITES)
FAST = {"deadline_s": 20.0, "attempts": 3, "pause_s": 0.01}


def weights(number: int) -> dict[str, bytes]:
    """The tree of a round: two large files, one that never changes, one that grows."""
    return {
        "adapter_model.safetensors": b"round %d" % number,
        "federated_state.safetensors": b"state %d" % number,
        "tokenizer.json": b"{}",
        "README.md": b"# Round %d\n" % number,
        "rounds.jsonl": b"{}\n" * number,
    }


def add(outbox: Outbox, *numbers: int) -> None:
    for number in numbers:
        outbox.add(
            number, lambda folder, number=number: [(folder / n).write_bytes(c) for n, c in weights(number).items()]
        )


# ---- what runs in the client's process ----


def push(folder, number: int, target: HubTarget = TARGET, **limits) -> str:
    box = Outbox(folder)
    return push_snapshot(target, box, box.get(number), **(FAST | limits))


def push_all(folder, target: HubTarget = TARGET, **limits) -> tuple[list[int], str, str]:
    """The rounds that are missing, the table, and what was logged."""
    with logged() as text:
        report = push_pending(target, Outbox(folder, tidy=False), **(FAST | limits))
    return report.missing, str(report), "\n".join(text)


@contextlib.contextmanager
def logged():
    """The warnings of the package."""
    lines: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: lines.append(record.getMessage())
    logger = logging.getLogger("fslora_hf")
    logger.addHandler(handler)
    try:
        yield lines
    finally:
        logger.removeHandler(handler)


# ---- what the Hub has in the end ----


def assert_on_hub(hub, outbox, *numbers: int, repo_id: str = "user/run") -> None:
    """Every round is one commit with its own files and one tag; `main` is the latest; nothing else is left."""
    repository = hub.find(repo_id)
    refs, rounds = repository.refs(), [outbox.get(number) for number in numbers]
    tags = {f"refs/tags/round-{number:04d}" for number in numbers}
    assert set(refs) == {"refs/heads/main"} | tags
    every = repository.git("rev-list", "--all").decode().split()
    bodies = {commit: repository.git("show", "-s", "--format=%B", commit).decode() for commit in every}
    for snapshot in rounds:
        commit = refs[f"refs/tags/{snapshot.tag}"]
        assert (snapshot.status, snapshot.commit) == ("pushed", commit) and not snapshot.tree.exists()
        assert bodies[commit].splitlines()[0] == f"Round {snapshot.round}"
        assert [found for found, body in bodies.items() if snapshot.digest in body] == [commit]
        files = repository.files(commit)
        assert {path: files[path] for path in weights(0)} == weights(snapshot.round)
    assert refs["refs/heads/main"] == refs[f"refs/tags/round-{max(numbers):04d}"]
    assert sum("fslora-snapshot" in body for body in bodies.values()) == len(numbers)
    repository.git("fsck", "--strict", "--full")


def asked(hub, part: str) -> list[int | None]:
    return [request.status for request in hub.requests if part in request.path]


def wait_for(condition) -> None:
    ends = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < ends
        time.sleep(0.02)


def all_answered(hub) -> bool:
    return None not in [request.status for request in hub.requests]
