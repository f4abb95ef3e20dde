"""Seeded damage of every file that a resume reads, on the disk and on the Hub, with and without checksums made right.

Each variant ends in success with the right result, or in one sentence, the run's folder being as it was. FSLORA_FUZZ
says how many variants of each file are tried, FSLORA_FUZZ_SEED which.
"""

import json
import logging
import math
import os
import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from fslora_hf.hub import fetch
from fslora_hf.hub.fetch import RESUMED
from fslora_hf.storage.checkpoint import STATE_NAME, write_state
from fslora_hf.storage.state_file import checksum, digest
from fslora_hf.trainers.resume import find_start
from tests.support import reference
from tests.support.damage import damaged
from tests.support.worker_train import ledger
from tests.trainers.test_bad_resume import files, make

COUNT, SEED = int(os.environ.get("FSLORA_FUZZ", "10")), int(os.environ.get("FSLORA_FUZZ_SEED", "1"))
RUN = {"num_rounds": 3, "clients_per_round": 2}
FEEDBACK = {"upload_top_k": 0.5, "error_feedback": True}
LAST = "checkpoint-4"  # of two rounds; the third is left to do
WAITING = "error_feedback/file.safetensors"
IN_CHECKPOINT = (STATE_NAME, *(name for name in RESUMED if name != "rounds.jsonl"))
LOCAL = (*IN_CHECKPOINT, "error_feedback.json", WAITING, "rounds.jsonl", "federated_run.json")


class Case:
    """A run of two rounds in a folder, or on the Hub, trainers that go on with it, and what they come to."""

    def __init__(self, folder: Path, on_hub: bool):
        args = RUN | ({} if on_hub else FEEDBACK)
        self.whole, self.folder, self.on_hub = folder / "whole", folder / "run", on_hub
        make(self.whole, **args | {"num_rounds": 2, "save_rounds": 2}).train()
        if on_hub:
            repository = folder / "repository"
            shutil.copytree(self.whole / LAST, repository)
            shutil.copy(self.whole / "rounds.jsonl", repository)
            run = json.loads((repository / STATE_NAME).read_text())["run"]
            write_state(repository, 2, run, RESUMED)
            self.whole = repository
        self.longer = make(self.folder, **args | {"save_rounds": 0})
        self.loading = make(self.folder, **args | {"num_rounds": 2})  # nothing is left to train
        self.fresh()
        self.go_on(self.longer)
        self.expected = reference.read_adapter(self.longer.model), self.rounds()

    @property
    def source(self) -> Path:
        """Where the damaged files lie."""
        return self.folder.parent / "source" if self.on_hub else self.folder

    @property
    def checkpoint(self) -> Path:
        return self.source if self.on_hub else self.source / LAST

    def fresh(self) -> None:
        for path in {self.source, self.folder}:
            shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(self.whole, self.source)

    def go_on(self, trainer) -> None:
        trainer.train(resume_from_checkpoint="user/run@main" if self.on_hub else True)

    def rounds(self) -> list[dict]:
        return [{**line, "seconds": 0} for line in ledger(self.folder)]

    def place(self, name: str) -> Path:
        if name == WAITING:
            return min((self.checkpoint / "error_feedback").rglob("*.safetensors"))
        return (self.source if name in ("rounds.jsonl", "federated_run.json") else self.checkpoint) / name

    def put(self, name: str, content: bytes, sealed: bool) -> None:
        """Replace a file; sealed, every checksum fits it, as far as it can be."""
        path = self.place(name)
        path.write_bytes(content)
        if not sealed:
            return
        if name == WAITING:
            renamed = path.rename(path.with_name(f"{path.name.split('-')[0]}-{checksum(path)[:16]}.safetensors"))
            index = json.loads((self.checkpoint / "error_feedback.json").read_text())
            (self.checkpoint / "error_feedback.json").write_text(json.dumps(index | {path.parent.name: renamed.name}))
            name = "error_feedback.json"
        try:
            state = json.loads((self.checkpoint / STATE_NAME).read_text())
            if name in state["files"]:
                state["files"][name] = checksum(self.checkpoint / name)
            state["digest"] = digest(state)
            (self.checkpoint / STATE_NAME).write_text(json.dumps(state))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return  # the state file itself, past sealing


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """A case of each kind, made when it is first asked for."""
    made = {}
    with pytest.MonkeyPatch.context() as patch:

        def get(on_hub: bool) -> Case:
            if on_hub not in made:
                folder = tmp_path_factory.mktemp("hub" if on_hub else "local")
                if on_hub:
                    serve(folder / "source", patch)
                made[on_hub] = Case(folder, on_hub)
            return made[on_hub]

        yield get


def serve(folder: Path, patch) -> None:
    """A repository whose files lie in a folder."""

    class Api:
        def __init__(self, token=None):
            self.token = token

        def model_info(self, repository, revision):
            return SimpleNamespace(sha="0" * 40)

        def list_repo_files(self, repository, revision):
            return [path.name for path in folder.iterdir()]

    def download(repository, name, revision, token):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"no {name}")
        return str(folder / name)

    patch.setattr(fetch, "HfApi", Api)
    patch.setattr(fetch, "hf_hub_download", download)


def attempt(case: Case, name: str, how: str, *, begins_again: bool) -> str:
    """Go on with what is there; what came of it."""
    trainer = case.loading if name.endswith(".safetensors") else case.longer
    before = files(case.folder) if case.folder.exists() else {}
    trainer.state.global_step = 0
    try:
        if begins_again:
            trainer.run.rounds_done = 0
            assert find_start(trainer.this_run, True) is None
            return "right"
        case.go_on(trainer)
    except ValueError as error:
        text = str(error)
        assert text.startswith("Expected") and text.isprintable() and len(text) < 2000, (how, text)
        assert trainer.state.global_step == 0 and without_lock(case.folder) == before, (how, text)
        return "refused"
    if name.endswith(".safetensors"):  # what the file says, whoever wrote it, and nothing that is no number
        (checkpoint,) = case.folder.glob("checkpoint-*")
        saved = load_file(checkpoint / "adapter_model.safetensors")
        loaded = reference.read_adapter(trainer.model)
        for module, pair in loaded.items():
            for side, tensor in zip("AB", pair, strict=True):
                assert torch.equal(tensor, saved[f"base_model.model.{module}.lora_{side}.weight"]), how
                assert math.isfinite(tensor.abs().sum()) or tensor.isfinite().all(), how
    else:
        assert reference.max_difference(reference.read_adapter(trainer.model), case.expected[0]) == 0, how
        assert case.rounds() == case.expected[1], how
    return "right"


def without_lock(folder: Path) -> dict[str, bytes]:
    return {name: content for name, content in files(folder).items() if not name.endswith(".lock")}


@pytest.mark.parametrize("sealed", [False, True], ids=["as it is", "checksums made right"])
@pytest.mark.parametrize(
    "on_hub, name",
    [*((False, name) for name in LOCAL), *((True, name) for name in (*IN_CHECKPOINT, "rounds.jsonl"))],
)
def test_whatever_is_damaged_a_run_goes_on_rightly_or_says_why_not(
    case, on_hub, name, sealed, caplog, record_property
):
    case, outcomes = case(on_hub), Counter()
    caplog.set_level(logging.ERROR)
    case.fresh()
    content = case.place(name).read_bytes()
    begins_again = name == "federated_run.json"
    for number in range(COUNT):
        damage = damaged(name, content, SEED + sealed, 7 * number)  # few go through all kinds, too
        case.put(name, damage.content, sealed)
        if begins_again:  # without a checkpoint it is what is gone by
            shutil.rmtree(case.checkpoint)
        outcomes[attempt(case, name, damage.how, begins_again=begins_again)] += 1
        case.fresh()
    record_property("outcomes", dict(outcomes))
    print(f"{'Hub' if on_hub else 'disk'} {name}, {'sealed' if sealed else 'unsealed'}: {dict(outcomes)}")
    assert outcomes["refused"] >= COUNT // 5


@pytest.mark.parametrize("on_hub", [False, True])
def test_what_was_refused_goes_on_once_it_is_mended(case, on_hub):
    """In the same folder, which no refusal has occupied."""
    case = case(on_hub)
    case.fresh()
    for name in ("adapter_model.safetensors", "trainer_state.json", "training_args.json"):
        content = case.place(name).read_bytes()
        case.put(name, b"[]", sealed=True)
        assert attempt(case, name, name, begins_again=False) == "refused"
        case.put(name, content, sealed=True)
    assert attempt(case, "trainer_state.json", "mended", begins_again=False) == "right"
