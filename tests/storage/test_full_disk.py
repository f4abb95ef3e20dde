"""A disk that fills up at any moment: one sentence, nothing half done left, and the right end once there is room."""

import errno
import os
import random
import shutil

import pytest
import torch

from fslora_hf.hub.fetch import fetch_round
from fslora_hf.hub.outbox import Outbox
from fslora_hf.reports.entries import read_results
from fslora_hf.reports.leaderboard import rank
from fslora_hf.reports.ledger import plot_ledger, read_ledger
from fslora_hf.storage.disk_errors import WriteError
from recipes.leaderboard import write_leaderboard
from tests.evaluation.test_evaluate import results_of
from tests.support.full_disk import FullDisk
from tests.support.photographs import differences, photograph
from tests.support.result_files import REFERENCE, evaluation
from tests.support.worker_train import build

pytest_plugins = ("tests.support.evaluated",)

NUMBER = int(os.environ.get("FSLORA_FULL_DISKS", "4"))
TOLD = (
    "^Expected (to write .*|output_dir to be a folder that can be written to), found 'No space left on device'.* room"
)
ROUNDS = {"num_rounds": 2, "local_steps": 1, "clients_per_round": 2, "save_rounds": 1, "max_length": 8}
ONE_BY_ONE = ("--per_device_eval_batch_size", "1")  # else what is asked anew is rounded as in other batches
ROUNDS |= {"upload_top_k": 0.5, "error_feedback": True}


def train(folder, resume=None, full_at=None) -> int:
    """A run, its final adapter and its figure; returns how many operations on the disk it took."""
    trainer = build(folder, ROUNDS, dtype=torch.float32)
    with FullDisk(folder, full_at) as disk:
        trainer.train(resume_from_checkpoint=resume)
        trainer.save_model()
        rounds = [row | {"seconds": 1.0} for row in read_ledger(trainer.ledger_path)]
        plot_ledger(rounds, folder / "rounds.png")
    return disk.count


def moments(count: int, number: int = NUMBER) -> list[int]:
    """Some of the operations 1 to `count`, the first and the last among them."""
    drawn = random.Random(count).sample(range(2, count), min(number, count - 2))
    return sorted({1, count, *drawn})


def unfinished(folder) -> list[str]:
    return [str(path.relative_to(folder)) for path in folder.rglob("*.partial")] if folder.exists() else []


@pytest.mark.slow
def test_a_run_on_a_disk_that_fills_up(tmp_path):
    folder = tmp_path / "run"
    count = train(folder)
    expected = photograph(folder)
    for moment in moments(count):
        shutil.rmtree(folder)
        with pytest.raises(WriteError, match=TOLD):
            train(folder, full_at=moment)
        assert not unfinished(folder), moment
        train(folder, resume=(folder / "federated_run.json").is_file() or None)
        assert not differences(photograph(folder), expected), moment


@pytest.mark.slow
def test_an_evaluation_on_a_disk_that_fills_up(run, base, tmp_path):
    folder = tmp_path / "results"

    def score():
        results_of(base, run, "--adapter", str(run), "--results_dir", str(folder), *ONE_BY_ONE)

    with FullDisk(folder) as disk:
        score()
    expected = photograph(folder)
    for moment in moments(disk.count, NUMBER // 2):
        shutil.rmtree(folder)
        with pytest.raises(WriteError, match=TOLD):
            with FullDisk(folder, moment):
                score()
        assert not [name for name in unfinished(folder) if not name.endswith(".jsonl")]
        score()
        assert not differences(photograph(folder), expected), moment


def test_a_leaderboard_on_a_disk_that_fills_up(tmp_path):
    (tmp_path / "a").mkdir()
    evaluation(tmp_path / "a", "reference", REFERENCE)
    board = rank(read_results([tmp_path / "a"]))
    folder = tmp_path / "board"
    write_leaderboard(board, folder)
    expected = {path.name: path.read_bytes() for path in folder.iterdir()}
    with FullDisk(folder) as disk:
        write_leaderboard(board, folder)
    for moment in range(1, disk.count + 1):
        with pytest.raises(WriteError, match=TOLD), FullDisk(folder, moment):
            write_leaderboard(board, folder)
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == expected, moment


def test_a_download_from_the_hub_on_a_disk_that_is_full(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("fslora_hf.hub.fetch._fetch", full)
    with pytest.raises(WriteError, match="^Expected to write ann/a@round-0001, found 'No space left .*: make room"):
        fetch_round("ann/a", "round-0001", tmp_path / "hub_resume")


def test_an_outbox_on_a_disk_that_fills_up(tmp_path):
    def keep():
        outbox = Outbox(tmp_path / "out")
        outbox.write_target("ann/a", "main", None)
        snapshot = outbox.add(1, lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"w"))
        outbox.mark_pushed(snapshot, "c" * 40)
        return [(each.round, each.status, each.commit) for each in outbox.all()]

    with FullDisk(tmp_path / "out") as disk:
        expected = keep()
    for moment in range(1, disk.count + 1):
        shutil.rmtree(tmp_path / "out")
        with pytest.raises(WriteError, match=TOLD):
            with FullDisk(tmp_path / "out", moment):
                keep()
        assert not unfinished(tmp_path / "out"), moment
        assert keep() == expected
