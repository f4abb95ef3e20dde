"""One launch at a time in a run's folder: two real processes on one, a killed holder, disks without locks."""

import errno
import json
import logging
import multiprocessing
import os
import signal
import threading
from pathlib import Path

import pytest
from transformers import TrainerCallback

from fslora_hf.launch import claimed, finish
from fslora_hf.storage import locks
from fslora_hf.storage.disk_errors import WriteError
from fslora_hf.storage.locks import LOCK_NAME, FolderInUse, held
from tests.support import federated
from tests.support.worker_train import build, ledger

ARGS = {"num_rounds": 3, "local_steps": 1, "clients_per_round": 2, "save_rounds": 1}
WAIT = 60  # seconds, for what comes at once


class Pause(TrainerCallback):
    """Stands still in the second round until told to go on."""

    def __init__(self, ready, go):
        self.ready, self.go = ready, go

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 2:
            self.ready.set()
            assert self.go.wait(WAIT)


def train(folder: str, ready, go) -> None:
    build(folder, ARGS, callbacks=[Pause(ready, go)]).train()


def hold(folder: str, ready, go) -> None:
    with held(folder):
        ready.set()
        assert go.wait(WAIT)


@pytest.fixture
def other():
    """Starts `train` or `hold` in a process of its own, and returns once it holds the folder."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.support.warm"])
    processes = []

    def start(target, folder) -> multiprocessing.Process:
        ready, go = context.Event(), context.Event()
        process = context.Process(target=target, args=(str(folder), ready, go))
        process.start()
        processes.append(process)
        assert ready.wait(WAIT)
        process.go = go
        return process

    yield start
    for process in processes:
        if process.is_alive():  # else this would wait for one that was killed to wake
            process.go.set()
        process.join(WAIT)


def contents(folder: Path) -> dict[str, bytes]:
    """What a folder holds, but for the lock's sign of life."""
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_run_is_refused_where_another_is_at_work(other, tmp_path):
    """Started twice, resumed while the first lives, with another seed: a sentence each, and the first is unharmed."""
    folder = tmp_path / "run"
    first = other(train, folder)
    before = contents(folder)
    assert len(ledger(folder)) == 1 and (folder / "checkpoint-2").is_dir()
    found = f"Expected no other run at work in {folder}, found process {first.pid} on .*, there since 20.*: wait until"
    for changes, resume in (({}, None), ({}, True), ({"seed": 1}, None), ({}, str(folder / "checkpoint-2"))):
        with pytest.raises(FolderInUse, match=found):
            build(folder, ARGS | changes).train(resume_from_checkpoint=resume)
        assert contents(folder) == before
    trainer = build(tmp_path / "elsewhere", ARGS)
    trainer.args.output_dir = str(folder)
    with pytest.raises(FolderInUse, match=found):
        finish(trainer)
    assert contents(folder) == before
    first.go.set()
    first.join(WAIT)
    assert first.exitcode == 0 and [line["round"] for line in ledger(folder)] == [0, 1, 2]
    assert not list(folder.rglob(f"*{LOCK_NAME}*"))  # neither beside the checkpoints nor in them
    build(folder, ARGS | {"num_rounds": 4}).train(resume_from_checkpoint=True)
    assert [line["round"] for line in ledger(folder)] == [0, 1, 2, 3]


def test_what_a_killed_run_holds_is_taken_over(other, tmp_path, caplog):
    folder = tmp_path / "run"
    first = other(train, folder)
    os.kill(first.pid, signal.SIGKILL)
    first.join(WAIT)
    assert (folder / LOCK_NAME).is_file()
    with caplog.at_level(logging.WARNING):
        build(folder, ARGS).train(resume_from_checkpoint=True)
    assert f"Taking {folder} over from process {first.pid} on " in caplog.text
    assert [line["round"] for line in ledger(folder)] == [0, 1, 2] and not (folder / LOCK_NAME).exists()


def test_a_script_says_one_sentence_before_anything_is_loaded(other, tmp_path):
    other(hold, tmp_path / "run")
    with pytest.raises(SystemExit, match="^Expected no other run at work in [^\n]*output_dir.$"):
        with claimed(str(tmp_path / "run")):
            raise AssertionError("the run began")


def test_a_second_server_asks_no_node_for_anything(other, tmp_path):
    source = federated.write_model_and_rows(tmp_path)
    other(hold, tmp_path / "run")
    exchange = federated.LocalExchange({})
    for resume in (False, True):
        recipe = str(federated.write_recipe(source, tmp_path))
        with pytest.raises(FolderInUse):
            federated.federate(recipe, exchange, resume=resume)
    assert not exchange.sent


def test_a_refused_run_leaves_a_folder_as_it_was(tmp_path):
    with pytest.raises(ValueError, match="found none: start without"):
        build(tmp_path / "run", ARGS).train(resume_from_checkpoint=True)
    assert list((tmp_path / "run").iterdir()) == []
    with pytest.raises(ZeroDivisionError), held(tmp_path / "a" / "b"):
        raise ZeroDivisionError
    assert not (tmp_path / "a").exists()


def test_a_holder_holds_again_and_a_forked_process_does_not(tmp_path):
    with held(tmp_path), held(tmp_path / "." / ""):
        pass
    assert not (tmp_path / LOCK_NAME).exists()
    with held(tmp_path):
        with held(tmp_path):
            pass
        child = os.fork()
        if child == 0:  # as a data loader's worker would be; it outlives nothing and holds nothing
            code = 1
            try:
                held(tmp_path).__enter__()
            except FolderInUse:
                code = 0
            finally:
                os._exit(code)
        assert os.waitpid(child, 0)[1] == 0
        with open(tmp_path / LOCK_NAME, "rb") as file:  # the child's end has not freed it
            assert locks.lock_file(file.fileno()) is False


def test_a_folder_is_given_back_wherever_the_process_works_by_then(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with held("run"):
        (tmp_path / "run" / "kept").touch()
        monkeypatch.chdir("/")
    assert not (tmp_path / "run" / LOCK_NAME).exists() and not locks._HELD


def test_a_worker_that_outlives_its_process_holds_nothing(tmp_path):
    """Else a killed run whose data loader's worker hangs could not be resumed."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        held(tmp_path).__enter__()
        worker = os.fork()
        if worker:
            os.write(write, str(worker).encode())
            os.kill(os.getpid(), signal.SIGKILL)
        signal.pause()
    os.waitpid(child, 0)
    worker = int(os.read(read, 20))
    try:
        with held(tmp_path):
            pass
    finally:
        os.kill(worker, signal.SIGKILL)


NOTE = {"host": "far", "process": 7, "since": "2026-01-02 03:04:05", "machine": "another", "id": "x"}


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(locks, "BEAT_SECONDS", 0.02)


@pytest.mark.parametrize("has_locks", [True, False])
def test_another_machine_is_known_by_its_sign_of_life(quick, tmp_path, monkeypatch, caplog, has_locks):
    """As on a disk whose locks are each machine's own, and on one that has none."""
    if not has_locks:
        monkeypatch.setattr(locks, "lock_file", lambda descriptor, wait=False: None)
    path = tmp_path / LOCK_NAME
    path.write_text(json.dumps(NOTE))
    stop = threading.Event()

    def live():
        times = iter(range(1, 10**6))
        while not stop.wait(0.005):
            os.utime(path, (next(times),) * 2)

    holder = threading.Thread(target=live)
    holder.start()
    try:
        with pytest.raises(FolderInUse, match="found process 7 on far, there since 2026-01-02 03:04:05:"):
            with held(tmp_path):
                raise AssertionError("taken")
    finally:
        stop.set()
        holder.join()
    with caplog.at_level(logging.WARNING), held(tmp_path):
        assert json.loads(path.read_text())["process"] == os.getpid()
    assert "Taking" in caplog.text and "process 7 on far" in caplog.text and not path.exists()


def test_of_two_that_come_at_once_where_nothing_is_locked_the_last_to_note_itself_holds(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "lock_file", lambda descriptor, wait=False: None)
    monkeypatch.setattr(locks.time, "sleep", lambda seconds: (tmp_path / LOCK_NAME).write_text(json.dumps(NOTE)))
    with pytest.raises(FolderInUse, match="process 7 on far"):
        with held(tmp_path):
            raise AssertionError("taken")


def test_signs_of_life_are_given(quick, tmp_path):
    with held(tmp_path):
        before = locks._stamp(tmp_path / LOCK_NAME)
        beat = threading.Event()
        for _ in range(500):
            if locks._stamp(tmp_path / LOCK_NAME) != before:
                break
            beat.wait(0.01)
        assert locks._stamp(tmp_path / LOCK_NAME) != before


def test_a_note_cut_short_and_a_holder_that_leaves_meanwhile(quick, tmp_path, caplog, monkeypatch):
    path = tmp_path / LOCK_NAME
    path.write_text('{"host": "a\\u001b')
    with held(tmp_path):
        pass
    assert "from another process, which is gone" in caplog.text
    path.write_text(json.dumps(NOTE | {"host": "a\nb\x1b[2J" + "x" * 10**4}))
    monkeypatch.setattr(locks.time, "sleep", lambda seconds: path.unlink(missing_ok=True))  # given back while watched
    caplog.clear()
    with held(tmp_path):
        assert json.loads(path.read_text())["process"] == os.getpid()
    assert caplog.text == ""


def test_no_locks_on_the_disk_is_told_from_a_lock_of_another(tmp_path, monkeypatch):
    def refuse(number):
        def flock(descriptor, operation):
            raise OSError(number, os.strerror(number))

        return flock

    with open(tmp_path / "file", "w") as file:
        for number, expected in ((errno.ENOSYS, None), (errno.ENOLCK, None), (errno.EWOULDBLOCK, False)):
            monkeypatch.setattr(locks.fcntl, "flock", refuse(number))
            assert locks.lock_file(file.fileno()) is expected
        monkeypatch.setattr(locks.fcntl, "flock", refuse(errno.EIO))
        with pytest.raises(OSError):
            locks.lock_file(file.fileno())


@pytest.mark.parametrize("name", ["file", "with\0nul", "n" * 300])
def test_a_folder_that_cannot_be_is_told(tmp_path, name):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(WriteError, match="^Expected output_dir to be a folder that can be written to, found '.*' at"):
        with held(tmp_path / name):
            raise AssertionError("taken")
    assert [path.name for path in tmp_path.iterdir()] == ["file"] and (tmp_path / "file").read_text() == "mine"
