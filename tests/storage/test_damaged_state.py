"""What a strange hand or a failing disk leaves of a checkpoint: one sentence, and the run's folder as it was."""

import json
import logging
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fslora_hf.evaluation.subjects import find_adapters
from fslora_hf.storage.checkpoint import STATE_NAME, CheckpointError, read_state, rotate
from fslora_hf.storage.state_file import checksum, digest
from fslora_hf.trainers.resume import find_start
from tests.support.worker_train import ledger
from tests.trainers.test_bad_resume import files, make

RUN = {"upload_top_k": 0.5, "error_feedback": True, "num_rounds": 3, "clients_per_round": 2}
LAST = "checkpoint-6"  # two clients, one at a time


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """Of three rounds, a checkpoint after each, with what clients left out; the trainer is free for other folders."""
    folder = tmp_path_factory.mktemp("run")
    trainer = make(folder, **RUN)
    trainer.train()
    return folder, trainer


@pytest.fixture
def folder(whole_run, tmp_path):
    return Path(shutil.copytree(whole_run[0], tmp_path / "run"))


@pytest.fixture
def start(whole_run, folder):
    """Finds where to begin as `train()` does, in the copy."""

    def find(resume=True):
        whole_run[1].args.output_dir = str(folder)
        return find_start(whole_run[1].this_run, resume)

    return find


def seal(checkpoint: Path, **changes) -> None:
    """Give a state file the checksums of what is there, and of itself: as a liar would."""
    path = checkpoint / STATE_NAME
    state = json.loads(path.read_text()) | changes
    for name in state["files"] if isinstance(state.get("files"), dict) else ():
        if (checkpoint / name).is_file():
            state["files"][name] = checksum(checkpoint / name)
    state["digest"] = digest(state)
    path.write_text(json.dumps(state))


def edit(name: str, change) -> None:
    """A change of a JSON file of the last checkpoint, with all checksums made right."""

    def apply(folder: Path) -> None:
        path = folder / LAST / name
        values = json.loads(path.read_text())
        path.write_text(json.dumps(change(values) or values))
        seal(folder / LAST)

    return apply


def write(name: str, text: str | bytes):
    def apply(folder: Path) -> None:
        (folder / LAST / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        seal(folder / LAST)

    return apply


def tensors(name: str, change):
    """A change of a file of tensors."""

    def apply(folder: Path) -> None:
        path = folder / LAST / name
        found = load_file(path)
        change(found, next(key for key in found if ".A" in key or "lora_A" in key))
        save_file({key: tensor.contiguous() for key, tensor in found.items()}, path)
        seal(folder / LAST)

    return apply


def waiting(change):
    """A change of the first file of what a client left out, under the name that fits its content."""

    def apply(folder: Path) -> None:
        path = min((folder / LAST / "error_feedback").rglob("*.safetensors"))
        found = load_file(path)
        change(found, next(key for key in found if key.endswith(".A")))
        save_file({key: tensor.contiguous() for key, tensor in found.items()}, path)
        renamed = path.with_name(f"{path.name.split('-')[0]}-{checksum(path)[:16]}.safetensors")
        path.rename(renamed)
        index = json.loads((folder / LAST / "error_feedback.json").read_text())
        index[path.parent.name] = renamed.name
        (folder / LAST / "error_feedback.json").write_text(json.dumps(index))
        seal(folder / LAST)

    return apply


def put(key, value):
    return lambda found, _: found.__setitem__(key, value)


def lines(change):
    def apply(folder: Path) -> None:
        path = folder / "rounds.jsonl"
        path.write_text("".join(change(path.read_text().splitlines(keepends=True))))

    return apply


def replace_by_folder(path: str):
    def apply(folder: Path) -> None:
        (folder / path).unlink() if (folder / path).is_file() else shutil.rmtree(folder / path)
        (folder / path).mkdir()

    return apply


def replace_by_file(path: str):
    def apply(folder: Path) -> None:
        shutil.rmtree(folder / path)
        (folder / path).write_text("mine")

    return apply


def first_row_wide(found, name):
    found[name] = found[name][:1]


def state(**changes):
    return lambda folder: seal(folder / LAST, **changes)


ADAPTER, SERVER = "adapter_model.safetensors", "federated_state.safetensors"
DEEP = "[" * 10_000 + "]" * 10_000
DAMAGE = {
    # All of the state file's own, which True passes over, are below.
    "round text": (state(round="2"), "found damage .'2' for a round"),
    "round huge": (state(round=10**9), "at most num_rounds=3 rounds, found 1000000000"),
    "round of none": (state(round=0), "found damage .0 for a round"),
    "round before": (state(round=2), "state files in it to tell of the same round, found round 2"),
    "round twice": (state(round=6), "at most num_rounds=3"),
    "files a list": (state(files=[]), "found damage .a list for files"),
    "files leading out": (state(files={"../rounds.jsonl": "0" * 64}), "'../rounds.jsonl', which leads out"),
    "files absolute": (state(files={"/etc/passwd": "0" * 64}), "'/etc/passwd', which leads out"),
    "no files": (state(files={}), "checksums of what a run is resumed from in .*, found none of adapter_model"),
    "run a list": (state(run=[]), "found damage .a list for run"),
    "mark": (state(ledger={"rounds": -1, "bytes": 0, "sha256": ""}), "a mark of a ledger with other values"),
    "trainer state a list": (write("trainer_state.json", "[]"), "state of a Trainer in .*damage .a list in place"),
    "trainer state garbage": (write("trainer_state.json", b"\xff\x00"), "state of a Trainer in .*found damage"),
    "trainer state deep": (write("trainer_state.json", DEEP), "damage .values nested too deep"),
    "trainer state unknown": (edit("trainer_state.json", lambda v: v | {"new\n": 1}), "damage .new, which it"),
    "trainer state log": (edit("trainer_state.json", lambda v: v | {"log_history": [1]}), "a number for a log entry"),
    "trainer state callbacks": (edit("trainer_state.json", lambda v: v | {"stateful_callbacks": []}), "for stateful"),
    "best of elsewhere": (
        edit("trainer_state.json", lambda v: v | {"best_model_checkpoint": "/home"}),
        "damage .'/home' for best_model_checkpoint",
    ),
    "step -5": (edit("trainer_state.json", lambda v: v | {"global_step": -5}), "found round 3 in .*and step -5 of"),
    "step text": (edit("trainer_state.json", lambda v: v | {"global_step": "6"}), "damage .'6' for global_step"),
    "step between": (edit("trainer_state.json", lambda v: v | {"global_step": 7}), "found round 3 .* and step 7 of"),
    "epoch": (edit("trainer_state.json", lambda v: v | {"epoch": 2.0}), "found round 3 .* step 6 of round 2 in"),
    "no epoch": (edit("trainer_state.json", lambda v: v.pop("epoch") and None), "damage .no epoch"),
    "arguments a list": (write("training_args.json", "[]"), "arguments of a run in .*damage .a list in place"),
    "arguments deep": (write("training_args.json", DEEP), "arguments of a run in .*damage .values nested too deep"),
    "arguments empty": (write("training_args.json", "{}"), "damage .None for num_rounds"),
    "arguments block": (
        edit("training_args.json", lambda v: v | {"per_device_train_clients": -1}),
        "damage .-1 for per_device_train_clients",
    ),
    "adapter config": (edit("adapter_config.json", lambda v: v | {"r": 7}), "damage .7 for r"),
    "adapter missing": (tensors(ADAPTER, lambda f, n: f.pop(n) is None), "tensors in .*adapter.*, found .*missing"),
    "adapter unknown": (tensors(ADAPTER, put("x", torch.ones(1))), "found x that nothing asks for"),
    "adapter unreadable": (write(ADAPTER, b"\x00" * 90), "tensors in .*adapter_model.*, found damage"),
    "adapter shape": (tensors(ADAPTER, first_row_wide), r"of shape \(6, .*, found \(1, .* in F64"),
    "adapter int8": (tensors(ADAPTER, lambda f, n: f.update({n: f[n].to(torch.int8)})), "found .* in I8"),
    "adapter half": (tensors(ADAPTER, lambda f, n: f.update({n: f[n].half()})), "found .* in F16"),
    "adapter NaN": (tensors(ADAPTER, lambda f, n: f[n].view(-1)[3:4].fill_(torch.nan) is None), "found NaN or"),
    "server missing": (tensors(SERVER, lambda f, n: f.pop(n) is None), "tensors in .*federated_state.*missing"),
    "server unknown": (tensors(SERVER, put("a.b.exp_avg", torch.ones(1))), "found a.b.exp_avg that nothing asks"),
    "server no dot": (tensors(SERVER, put("nodot", torch.ones(1))), "found nodot that nothing asks"),
    "server unreadable": (write(SERVER, b"{}"), "tensors in .*federated_state.safetensors, found damage"),
    "server shape": (tensors(SERVER, lambda f, n: f.update({n: torch.zeros(1, 1)})), r"found \(1, 1\) in F32"),
    "server step": (
        tensors(SERVER, lambda f, n: [f[k].fill_(0) for k in f if k.endswith("step")]),
        "Expected a number of 1 to 3 steps in .*step in .*, found 0",
    ),
    "server squares": (
        tensors(SERVER, lambda f, n: [f[k].fill_(-1) for k in f if k.endswith("exp_avg_sq")]),
        "Expected squares in .*exp_avg_sq in .*, found values below zero",
    ),
    "index a list": (write("error_feedback.json", "[]"), "left out .* in .*found damage .a list in place"),
    "index leading out": (
        write("error_feedback.json", json.dumps({"..": "../x.safetensors"})),
        "damage .the name '../x.safetensors'",
    ),
    "index of another": (
        edit("error_feedback.json", lambda v: {"99": next(iter(v.values()))}),
        "files of this run's clients in its first 3 rounds in .*, found error_feedback/99/",
    ),
    "waiting a file": (replace_by_file(f"{LAST}/error_feedback"), "has left out of its updates, found no file"),
    "waiting missing": (waiting(lambda f, n: f.pop(n[:-1] + "rows") is None), "error_feedback.*rows missing"),
    "waiting shape": (waiting(first_row_wide), r"error_feedback.*, found \(1, "),
    "waiting type": (waiting(lambda f, n: f.update({n: f[n].float()})), "error_feedback.*found .* in F32"),
    "waiting NaN": (waiting(lambda f, n: f[n].view(-1)[:1].fill_(torch.nan) is None), "found NaN or"),
    "waiting rows": (waiting(lambda f, n: f[n[:-1] + "rows"].add_(100) is None), "ascending rows of the global adapt"),
    "its place a file": (replace_by_file("error_feedback"), "Expected .*error_feedback to be free"),
    "ledger a folder": (replace_by_folder("rounds.jsonl"), "Expected the ledger .* to be a file, found a folder"),
    "ledger line missing": (lines(lambda all: [all[0], all[2]]), "found round 1 missing: restore it"),
    "ledger line damaged": (lines(lambda all: [all[0], all[1][:50] + "\n", all[2]]), "round 1 missing .line 2 is no"),
    "ledger no round": (lines(lambda all: ['{"a": 1}\n', *all[1:]]), "found round 0 missing .line 1 is no round's"),
    "ledger two runs": (
        lines(lambda all: [all[0].replace('"clients"', '"other"'), *all]),
        "found two different records of round 0",
    ),
    "ledger empty record": (lines(lambda all: ['{"round": 0}\n', *all[1:]]), "record on line 1 of .*found none of"),
    "ledger values": (lines(lambda all: [all[0].replace('"clients": [', '"clients": [[],'), *all[1:]]), "for clients"),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_one_sentence_and_the_folder_stays(folder, start, case):
    damage, message = DAMAGE[case]
    damage(folder)
    before = files(folder)
    with pytest.raises(ValueError, match=message) as caught:
        start(str(folder / LAST))
    text = str(caught.value)
    assert text.startswith("Expected") and "\n" not in text and len(text) < 1500
    assert files(folder) == before


def test_an_undamaged_one_passes(folder, start):
    assert start(str(folder / LAST)) == str(folder / LAST) == start()


@pytest.mark.parametrize("place", range(0, 400, 23))
def test_no_flipped_bit_of_a_state_changes_a_run(folder, start, place):
    path = folder / LAST / STATE_NAME
    content = bytearray(path.read_bytes())
    content[place] ^= 1 << place % 7
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"Expected a readable {STATE_NAME} in .*, found damage"):
        start(str(folder / LAST))


STATES = {"empty": b"", "garbage": b"\xff\xfe{", "a list": b"[]", "no run": b'{"format": 1, "round": 3, "files": {}}'}


@pytest.mark.parametrize("text", STATES.values(), ids=STATES)
@pytest.mark.parametrize("damaged, rest", [(LAST, "checkpoint-4"), ("checkpoint-2", LAST)])
def test_a_damaged_state_stands_in_no_ones_way(folder, start, caplog, damaged, rest, text):
    """Neither of the latest whole checkpoint, nor of one that is named, nor of rotation in mid-run."""
    (folder / damaged / STATE_NAME).write_bytes(text)
    with caplog.at_level(logging.WARNING):
        assert start(True) == str(folder / rest)
    assert [each.round for each in find_adapters(str(folder))[0]] == ([1, 2] if damaged == LAST else [2, 3])
    warned = [message for message in caplog.messages if message.startswith(f"Passing over the checkpoint {folder}")]
    assert warned and all(str(folder / damaged) in message for message in warned)
    assert start(str(folder / "checkpoint-4")) == str(folder / "checkpoint-4")
    rotate(folder, 1, proven=3)
    assert (folder / damaged / STATE_NAME).read_bytes() == text


def test_nothing_but_damaged_checkpoints_is_no_reason_to_begin_again(folder, start):
    """The ledger and what they hold would be lost."""
    for path in folder.glob(f"checkpoint-*/{STATE_NAME}"):
        path.write_text("{")
    before = files(folder)
    message = f"Expected a checkpoint with a readable {STATE_NAME} in .*, found damage in checkpoint-2, checkpoint-4"
    with pytest.raises(CheckpointError, match=message):
        start(True)
    assert files(folder) == before


@pytest.mark.parametrize("text", ["[]", "{", "", DEEP])
def test_a_damaged_identity_of_a_run_without_checkpoints(folder, whole_run, text):
    for path in folder.glob("checkpoint-*"):
        shutil.rmtree(path)
    (folder / "federated_run.json").write_text(text)
    before = files(folder)
    trainer = make(folder, **RUN)
    with pytest.raises(
        CheckpointError, match="Expected the settings of the run that was begun here in .*found damage"
    ):
        find_start(trainer.this_run, True)
    assert files(folder) == before


def test_a_checkpoint_of_the_format_before_goes_on_with_a_warning(folder, start, caplog):
    path = folder / LAST / STATE_NAME
    state = {key: value for key, value in json.loads(path.read_text()).items() if key not in ("digest", "ledger")}
    path.write_text(json.dumps(state | {"format": 1}))
    with caplog.at_level(logging.WARNING):
        assert start() == str(folder / LAST)
    told = "is of an earlier format, without a checksum of itself.*With lora_dropout, other numbers are drawn"
    assert any(re.search(told, message) for message in caplog.messages)
    for round in (2, 4):
        path.write_text(json.dumps(state | {"format": 1, "round": round}))
        with pytest.raises(CheckpointError, match="tell of the same round|at most num_rounds"):
            start(str(folder / LAST))
    path.write_text(json.dumps(state | {"format": 1, "round": 3, "digest": ""}))
    with pytest.raises(CheckpointError, match="keys missing or too many: digest"):
        start(str(folder / LAST))
    path.write_text(json.dumps(state | {"format": 3}))
    with pytest.raises(CheckpointError, match="the format 3, of 1 and 2 that are known"):
        read_state(folder / LAST)


def test_a_mended_ledger_is_told(folder, start, caplog):
    path = folder / "rounds.jsonl"
    text = path.read_text()
    path.write_text("".join(text.splitlines(keepends=True)[:2]) + text)
    with caplog.at_level(logging.WARNING):
        start()
    assert [round["round"] for round in ledger(folder)] == [0, 1, 2] and path.read_text() == text
    (message,) = [message for message in caplog.messages if "was mended" in message]
    assert message.endswith("is in it once: line 3 repeats round 0; line 4 repeats round 1.")


def test_after_a_refusal_the_next_try_is_not_refused_as_occupied(whole_run, folder, tmp_path):
    """A checkpoint of elsewhere, damaged at first."""
    whole, trainer = whole_run
    new = tmp_path / "new"
    DAMAGE["server shape"][0](folder)
    trainer.args.output_dir = str(new)
    with pytest.raises(CheckpointError, match="found .1, 1. in F32"):
        find_start(trainer.this_run, str(folder / LAST))
    assert not new.exists() or not files(new)
    assert find_start(trainer.this_run, str(whole / LAST)) == str(whole / LAST)
    assert [line["round"] for line in ledger(new)] == [0, 1, 2]


def test_a_stop_within_a_round_saves_a_state_of_the_round(tmp_path):
    """Its step and epoch are the round's, whatever was done of the next."""
    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_save = control.should_training_stop = state.global_step == 7

    trainer = make(tmp_path / "run", num_rounds=3, save_rounds=0)
    trainer.add_callback(Stop())
    trainer.train()
    saved = json.loads((tmp_path / "run" / "checkpoint-5" / "trainer_state.json").read_text())
    assert (saved["global_step"], saved["epoch"]) == (5, 1.0)
    resumed = make(tmp_path / "run", num_rounds=3, save_rounds=0)
    resumed.train(resume_from_checkpoint=True)
    assert [line["round"] for line in ledger(tmp_path / "run")] == [0, 1, 2]
