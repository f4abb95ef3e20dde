"""Law 3: stopped by SIGKILL at any moment and resumed from the last complete checkpoint equals uninterrupted.

What a kill leaves is the folder as it was: one run is photographed at each of its disk operations, and resumed from
each photograph; that a real kill leaves the same is tested, too, and all kills within steps are real. Killed runs are
processes of their own (forked from a server that has done the imports, so each costs a second). Bit for bit on the
same layout, in fp32, with dropout and server Adam; up to rounding on another layout.
"""

import shutil
import signal

import pytest

from tests.support import reference
from tests.support.photographs import differences, photograph
from tests.support.worker_train import check_same_ledger, ledger, load_result, run

pytest_plugins = ("tests.support.forked",)

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
SAVE = [STEPS, 2 * STEPS]  # from the second round's first step to the third's: its end saves
REMOVAL = [2 * STEPS, 3 * STEPS]  # the third round, whose end proves the second's checkpoint: the first's is removed


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
    """The folder of a whole run with an album of it, and the disk operations that a kill can fall on."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    return folder, album_of(fork, folder, SAVE)


def last_checkpoint(folder):
    """The newest checkpoint of a folder's run, by the number in its name."""
    return max((folder / "run").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))


def check_same_end(folder, whole, rounds: int, steps: int = STEPS):
    """Adapter, every tensor of the last checkpoint (so also the server's) and ledger, bit for bit.

    `rounds`, of `steps` each, is how many the last process trained: those after the last complete checkpoint, no more.
    """
    assert int((folder / "end.steps").read_text()) == rounds * steps
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
    check_same_end(tmp_path, whole, ROUNDS)
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
    check_same_end(tmp_path, whole, ROUNDS - step // STEPS)


METHODS = {
    "hetlora": {},
    "flexlora": {"server_optim": "sgd"},
    "flora": {"server_optim": "sgd"},
    "flora_residual": {"server_optim": "sgd"},
    "ffa_lora": {"client_ranks": None},
}


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_law_3_of_every_method(fork, tmp_path, method):
    """Killed in the last step before a round closes, and killed again between the next round's two clients."""
    args = {**ARGS, "method": method, **METHODS[method]}
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    whole.mkdir(), stopped.mkdir()
    kill = {"event": "on_optimizer_step", "step": 2 * STEPS - 1}
    codes = fork(job(whole, args=args), job(stopped, args=args, kill=kill))
    assert codes == [0, -signal.SIGKILL]
    again = {"event": "on_step_begin", "step": STEPS + LOCAL_STEPS}
    assert fork(job(stopped, args=args, resume=True, kill=again)) == [-signal.SIGKILL]
    assert fork(job(stopped, args=args, resume=True)) == [0]
    check_same_end(stopped, whole, 1)


@pytest.mark.slow
def test_law_3_killed_twice(uninterrupted, fork, tmp_path):
    whole, _ = uninterrupted
    assert fork(job(tmp_path, kill={"event": "on_substep_end", "step": STEPS + 3})) == [-signal.SIGKILL]
    # The second process counts its own steps: it resumed at the second round.
    again = {"event": "on_substep_end", "step": STEPS + 3}
    assert fork(job(tmp_path, resume=True, kill=again)) == [-signal.SIGKILL]
    assert fork(job(tmp_path, resume=True)) == [0]
    check_same_end(tmp_path, whole, 1)


def test_law_3_the_kills_fall_on_every_file(uninterrupted):
    _, operations = uninterrupted
    text = "\n".join(operations.values())
    for part in ("adapter_model.safetensors", "trainer_state.json", "rounds.jsonl", "rename", "next round begins"):
        assert part in text, text
    assert sum(what.startswith("native write") and "safetensors" in what for what in operations.values()) >= 2, text


def album_of(fork, folder, watch, prepare=None, **changes) -> dict[int, str]:
    """What a run does to the disk while watched: the number of each operation, and what it is.

    `<folder>/album/<number>/run` is the run's folder at each moment. The run begins in a copy of `prepare`, if given.
    """
    shutil.copytree(prepare, folder, dirs_exist_ok=True) if prepare else None
    watched = job(folder, watch=watch, operations=str(folder / "operations"), album=str(folder / "album"), **changes)
    assert fork(watched) == [0]
    return dict(enumerate((folder / "operations").read_text().splitlines(), start=1))


def resume_from_each(operations, album, whole, tmp_path, rounds, begun=None):
    """Resumes a run from its folder as it was at each of the numbered operations, and compares the ends.

    In this process, and once from folders that are equal. `rounds` are left, one less once a checkpoint has got its
    name. Before operation `begun` there is no run to resume.
    """
    wrong = []
    named = next((n for n, what in operations.items() if what.startswith("os.rename checkpoint")), max(operations))
    for numbers in equal_folders(album, operations):
        n, folder = numbers[-1], tmp_path / "resumed"
        shutil.copytree(album / str(n), folder)
        try:
            resume_or_begin(folder, refused=begun is not None and n < begun)
            check_same_end(folder, whole, rounds - (n > named))
        except (AssertionError, ValueError) as error:
            wrong.append(f"{numbers} ({operations[n]}): {error}")
        shutil.rmtree(folder)
    assert not wrong, "\n".join(wrong)


def equal_folders(album, numbers) -> list[list[int]]:
    """The numbers, those whose photographs hold the same folders and files together."""
    found = {}
    for n in numbers:
        paths = sorted((album / str(n)).rglob("*"))
        key = tuple((str(path.relative_to(album / str(n))), path.is_file() and path.read_bytes()) for path in paths)
        found.setdefault(key, []).append(n)
    return list(found.values())


def resume_or_begin(folder, refused: bool) -> None:
    """Resumes a run; where there is none and that may be refused, in a sentence, begins it as new."""
    try:
        run(job(folder, resume=True))
    except ValueError as error:
        if not refused or not f"{type(error).__name__}: {error}".startswith("CheckpointError: Expected"):
            raise
        run(job(folder))


def kill_and_resume(fork, number, operations, album, whole, tmp_path, watch, rounds, prepare=None, **changes):
    """By a true SIGKILL: it leaves what the photograph shows, and a new process resumes from it."""
    folder = tmp_path / f"killed-{number}"
    shutil.copytree(prepare, folder) if prepare else folder.mkdir()
    assert fork(job(folder, watch=watch, kill={"operation": number}, **changes)) == [-signal.SIGKILL]
    left, seen = contents(folder / "run", folder), contents(album / str(number) / "run", album.parent)
    assert not differences(left, seen), operations[number]
    assert fork(job(folder, resume=True)) == [0]
    named = next((n for n, what in operations.items() if what.startswith("os.rename checkpoint")), max(operations))
    check_same_end(folder, whole, rounds - (number > named))


def contents(folder, place) -> dict[str, str]:
    """What is in a folder, but for clocks, the process that holds it, and the place where the run was."""
    found = photograph(folder)
    found.pop(".run.lock", None)
    return {name: content.replace(str(place), "") for name, content in found.items()}


def first(operations, *beginnings) -> list[int]:
    """The first operation of each beginning."""
    return [next(n for n, what in operations.items() if what.startswith(beginning)) for beginning in beginnings]


@pytest.mark.slow
def test_law_3_killed_at_every_disk_operation_of_a_save(uninterrupted, tmp_path):
    """Before, in the middle of and after each write, rename and removal between two rounds."""
    whole, operations = uninterrupted
    resume_from_each(operations, whole / "album", whole, tmp_path, ROUNDS - 1)


@pytest.mark.slow
def test_law_3_a_kill_leaves_what_the_photograph_shows(uninterrupted, fork, tmp_path):
    whole, operations = uninterrupted
    for n in first(operations, "open ", "opened ", "half written ", "torn ", "os.rename checkpoint"):
        kill_and_resume(fork, n, operations, whole / "album", whole, tmp_path, SAVE, ROUNDS - 1)


@pytest.mark.slow
def test_law_3_killed_at_every_disk_operation_of_a_removal(uninterrupted, fork, tmp_path):
    """While the checkpoint that a proven one has taken the place of is renamed and its files go."""
    whole, _ = uninterrupted
    look = tmp_path / "look"
    operations = album_of(fork, look, REMOVAL)
    gone = {n: what for n, what in operations.items() if f".checkpoint-{STEPS}.partial" in what}
    assert len(gone) > 8 and any("rename" in what for what in gone.values()), operations
    resume_from_each(gone, look / "album", whole, tmp_path, ROUNDS - 2)
    middle = sorted(gone)[len(gone) // 2]
    kill_and_resume(fork, middle, gone, look / "album", whole, tmp_path, REMOVAL, ROUNDS - 2)


@pytest.mark.slow
def test_law_3_killed_before_the_first_checkpoint_is_whole(uninterrupted, fork, tmp_path):
    """Nothing to resume from: the run begins again. From the very first write to the first checkpoint's own name.

    A kill before the first round's first step leaves no run at all; that may be refused, but not with a traceback.
    """
    whole, _ = uninterrupted
    look, watch = tmp_path / "look", [-1, STEPS + 1]
    operations = album_of(fork, look, watch)
    first_round = next(n for n, what in operations.items() if "rounds.jsonl" in what)
    first_save = next(n for n, what in operations.items() if "checkpoint" in what)
    moments = {n: what for n, what in operations.items() if n <= first_save or "federated" in what or "rename" in what}
    assert len(moments) > 8, moments
    resume_from_each(moments, look / "album", whole, tmp_path, ROUNDS, begun=first_round)
    kill_and_resume(fork, first_save, moments, look / "album", whole, tmp_path, watch, ROUNDS)


@pytest.mark.slow
def test_law_3_killed_while_resuming(uninterrupted, fork, tmp_path):
    """A kill before a checkpoint has its name, so that the ledger is ahead of the last one, and another at each write
    with which a resumed run begins."""
    whole, _ = uninterrupted
    stopped, look, watch = tmp_path / "stopped", tmp_path / "look", [-1, 1]
    stopped.mkdir()
    unnamed = {"operation": f"os.rename checkpoint-{2 * STEPS}"}
    assert fork(job(stopped, watch=SAVE, kill=unnamed)) == [-signal.SIGKILL]
    assert len(ledger(stopped / "run")) == 2
    operations = album_of(fork, look, watch, stopped, resume=True)
    (cut, *_) = [n for n, what in operations.items() if "rounds.jsonl" in what]
    resume_from_each(operations, look / "album", whole, tmp_path, ROUNDS - 1)
    kill_and_resume(
        fork, cut, operations, look / "album", whole, tmp_path, watch, ROUNDS - 1, prepare=stopped, resume=True
    )


@pytest.mark.slow
def test_law_3_killed_after_the_last_checkpoint(uninterrupted, fork, tmp_path):
    whole, _ = uninterrupted
    assert fork(job(tmp_path, kill={"event": "on_train_end", "step": ROUNDS * STEPS})) == [-signal.SIGKILL]
    assert fork(job(tmp_path, resume=True)) == [0]
    check_same_end(tmp_path, whole, 0)


@pytest.mark.slow
def test_law_3_on_two_processes(fork_ranks, tmp_path):
    """Both processes are gone when one is killed; two take the run up and end bit for bit where two would have."""
    args = {**ARGS, "clients_per_round": 3}  # in the last turn of a round one process idles
    steps = 2 * LOCAL_STEPS
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    whole.mkdir(), stopped.mkdir()
    assert fork_ranks(job(whole, args=args)) == [0, 0]
    kill = {"event": "on_substep_end", "step": 2 * steps + 1}
    assert -signal.SIGKILL in fork_ranks(job(stopped, args=args, kill=kill))
    assert len(ledger(stopped / "run")) == 2
    assert fork_ranks(job(stopped, args=args, resume=True)) == [0, 0]
    check_same_end(stopped, whole, 1, steps)


@pytest.mark.slow
def test_law_3_resumed_in_other_layouts(fork, fork_ranks, tmp_path):
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
    assert -signal.SIGKILL in fork_ranks(job(moved, args=blocks, **exact, resume=True, kill=in_the_fourth))
    assert len(ledger(moved / "run")) == 3
    final = job(moved, args={**args, "per_device_train_clients": 3}, **exact, resume=True)
    assert fork(final) == [0]
    assert int((moved / "end.steps").read_text()) == 2 * LOCAL_STEPS  # one round, of two blocks
    assert reference.max_difference(load_result(moved / "end"), load_result(whole / "end")) < EXACT
    check_same_ledger(moved / "run", whole / "run")
