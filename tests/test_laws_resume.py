"""Law 3: stopped by SIGKILL at any moment and resumed from the last complete checkpoint equals uninterrupted.

Every run is a process of its own (forked from a server that has done the imports, so it costs a second) and the kills
are real. Bit for bit on the same layout, in fp32, with dropout and server Adam; up to rounding on another layout.
"""

import multiprocessing
import shutil
import signal
from itertools import zip_longest

import pytest

from tests import reference
from tests.worker_train import check_same_ledger, launch, ledger, load_result, run

EXACT = 1e-9
ROUNDS, LOCAL_STEPS, COHORT = 3, 2, 2
STEPS = LOCAL_STEPS * COHORT  # optimizer steps of a round, one client each
ARGS = {
    "optim": "adamw_torch",
    "num_rounds": ROUNDS,
    "local_steps": LOCAL_STEPS,
    "clients_per_round": COHORT,
    "gradient_accumulation_steps": 2,
    "lr_scheduler_type": "cosine",
    "client_ranks": [1, 2, 4, 6, 3],
    "server_optim": "adam",
    "save_rounds": 1,
    "save_total_limit": 1,
}
SAVED_BEFORE = [STEPS, 2 * STEPS + 1]  # from the second round's start, whose end saves, to the third's first step


@pytest.fixture(scope="module")
def fork():
    """Runs jobs of tests/worker_train.py in forked processes, several at a time; returns their exit codes."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.worker_train"])

    def start_and_wait(*jobs: dict) -> list[int]:
        processes = [context.Process(target=run, args=(job,)) for job in jobs]
        for process in processes:
            process.start()
        for process in processes:
            process.join(120)
        return [process.exitcode for process in processes]

    return start_and_wait


def job(folder, **changes) -> dict:
    return {
        "output_dir": str(folder / "run"),
        "args": ARGS,
        "lora": {"dropout": 0.1},
        "dtype": "float32",
        "result": str(folder / "end"),
        **changes,
    }


@pytest.fixture(scope="module")
def uninterrupted(fork, tmp_path_factory):
    """The folder of a whole run, and the disk operations that a kill can fall on."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    assert fork(job(folder, watch=SAVED_BEFORE, operations=str(folder / "operations"))) == [0]
    return folder, (folder / "operations").read_text().splitlines()


def last_checkpoint(folder):
    """The newest checkpoint of a folder's run, by the number in its name."""
    return max((folder / "run").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))


def check_same_end(folder, whole):
    """Adapter, every tensor of the last checkpoint (so also the server's) and ledger, bit for bit."""
    assert reference.max_difference(load_result(folder / "end"), load_result(whole / "end")) == 0
    checkpoint, expected = last_checkpoint(folder), last_checkpoint(whole)
    tensors = sorted(path.name for path in expected.glob("*.safetensors"))
    assert len(tensors) >= 2 and tensors == sorted(path.name for path in checkpoint.glob("*.safetensors"))
    for name in tensors:
        assert (checkpoint / name).read_bytes() == (expected / name).read_bytes(), name
    lines, expected_lines = ledger(folder / "run"), ledger(whole / "run")
    assert [line["round"] for line in lines] == list(range(ROUNDS))
    for line in lines + expected_lines:
        del line["seconds"]
    assert lines == expected_lines


def test_two_uninterrupted_runs_are_equal(uninterrupted, fork, tmp_path):
    """Without this the comparisons below would say nothing; and dropout must matter to what they compare."""
    whole, _ = uninterrupted
    (tmp_path / "dry").mkdir()
    assert fork(job(tmp_path), job(tmp_path / "dry", lora={"dropout": 0.0})) == [0, 0]
    check_same_end(tmp_path, whole)
    assert reference.max_difference(load_result(tmp_path / "dry" / "end"), load_result(whole / "end")) > 1e-6


IN_A_STEP = [
    ("on_step_begin", 2 * STEPS),  # right after a checkpoint
    ("on_substep_end", 2 * STEPS + 1),  # between two micro-batches of a client's second step
    ("on_pre_optimizer_step", 2 * STEPS + 3),
    ("on_optimizer_step", 3 * STEPS - 1),  # the last step, before the round closes
    ("on_substep_end", STEPS + 2),
]


@pytest.mark.slow
@pytest.mark.parametrize("event, step", IN_A_STEP)
def test_law_3_killed_in_a_local_step(uninterrupted, fork, tmp_path, event, step):
    whole, _ = uninterrupted
    assert fork(job(tmp_path, kill={"event": event, "step": step})) == [-signal.SIGKILL]
    assert fork(job(tmp_path, resume=True)) == [0]
    check_same_end(tmp_path, whole)


@pytest.mark.slow
def test_law_3_killed_twice(uninterrupted, fork, tmp_path):
    whole, _ = uninterrupted
    assert fork(job(tmp_path, kill={"event": "on_substep_end", "step": STEPS + 3})) == [-signal.SIGKILL]
    # The second process counts its own steps: it resumed at the second round.
    again = {"event": "on_substep_end", "step": STEPS + 3}
    assert fork(job(tmp_path, resume=True, kill=again)) == [-signal.SIGKILL]
    assert fork(job(tmp_path, resume=True)) == [0]
    check_same_end(tmp_path, whole)


def test_law_3_the_kills_fall_on_every_file(uninterrupted):
    _, operations = uninterrupted
    text = "\n".join(operations)
    for part in ("adapter_model.safetensors", "trainer_state.json", "rounds.jsonl", "next round begins"):
        assert part in text, text
    assert sum(line.startswith("native write") and "safetensors" in line for line in operations) >= 2, text


@pytest.mark.slow
def test_law_3_killed_at_every_disk_operation_of_a_save(uninterrupted, fork, tmp_path):
    """Before, in the middle of and after each write, rename and removal between two rounds."""
    whole, operations = uninterrupted
    wrong = []
    numbers = range(1, len(operations) + 1)
    for pair in zip_longest(numbers[::2], numbers[1::2]):  # two at a time: they are most of this file's time
        folders = {n: tmp_path / str(n) for n in pair if n}
        for folder in folders.values():
            folder.mkdir()
        killed = fork(*(job(folders[n], watch=SAVED_BEFORE, kill={"operation": n}) for n in folders))
        resumed = fork(*(job(folder, resume=True) for folder in folders.values()))
        for n, codes in zip(folders, zip(killed, resumed, strict=True), strict=True):
            try:
                assert codes == (-signal.SIGKILL, 0)
                check_same_end(folders[n], whole)
            except AssertionError as error:
                wrong.append(f"{n} ({operations[n - 1]}): {error}")
            shutil.rmtree(folders[n])
    assert not wrong, "\n".join(wrong)


@pytest.mark.slow
def test_law_3_resumed_in_other_layouts(fork, tmp_path):
    """One process, killed; two processes with blocks of 2, killed; one process with blocks of 3 to the end."""
    rounds = {"clients_per_round": None, "num_rounds": 4, "save_total_limit": None}
    args = {**ARGS, **rounds}
    whole, moved = tmp_path / "whole", tmp_path / "moved"
    exact = {"lora": {}, "dtype": "float64"}
    for folder in (whole, moved):
        folder.mkdir()
    one = 5 * LOCAL_STEPS  # steps of a round of 5 clients, one at a time
    in_the_third = {"event": "on_substep_end", "step": 2 * one + 3}
    codes = fork(job(whole, args=args, **exact), job(moved, args=args, **exact, kill=in_the_third))
    assert codes == [0, -signal.SIGKILL]
    blocks = {**args, "per_device_train_clients": 2}
    two = 2 * LOCAL_STEPS  # 3 blocks on 2 processes: 2 turns
    in_the_fourth = {"event": "on_substep_end", "step": two + 1}
    finished = launch(job(moved, args=blocks, **exact, resume=True, kill=in_the_fourth), tmp_path)
    assert finished.returncode != 0 and len(ledger(moved / "run")) == 3, finished.stderr[-3000:]
    final = job(moved, args={**args, "per_device_train_clients": 3}, **exact, resume=True)
    assert fork(final) == [0]
    assert reference.max_difference(load_result(moved / "end"), load_result(whole / "end")) < EXACT
    check_same_ledger(moved / "run", whole / "run")
