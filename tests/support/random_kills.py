"""Scripts that are killed at random moments and started again, until they end; imported by a fork server.

A moment is either a time, or an operation on the disk (with files half written, see `DiskOperations`). Of a
comparison, the kill takes the script and its run, or the script alone, whose run then goes on by itself.
"""

import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import fslora_hf.comparison.results as results
import recipes.compare
import recipes.evaluate
import recipes.train  # noqa: F401  (ready for forked children)
from tests.support.disk_operations import DiskOperations
from tests.support.forked_trainings import at_end, fork_trainings, run_main
from tests.support.photographs import differences, photograph

ROOT = Path(__file__).parents[2]


class GroupKill(DiskOperations):
    """Kills all of the process's group at the operation; in children that are forked, too."""

    def happens(self, what: str, path, tear: bool = False) -> None:
        kill, os.kill = os.kill, lambda pid, number: os.killpg(os.getpgid(pid), number)
        try:
            super().happens(what, path, tear)
        finally:
            os.kill = kill


def play(command: list[str], said: str, root: str, operation: int | None, counted: str | None) -> None:
    """In a forked process: run a script, its output into the file `said`."""
    os.setpgid(0, 0)
    for number in (1, 2):
        os.dup2(os.open(said, os.O_CREAT | os.O_WRONLY | os.O_APPEND), number)
    fork_trainings()
    if operation is not None or counted is not None:
        disk = GroupKill(root, operation)
        disk.armed = True
        if counted is not None:
            at_end.append(partial(_note, counted, disk))
    totals = results.totals
    results.totals = lambda records: totals(records) | {"seconds": 0.0}
    os._exit(run_main(command))


def _note(path: str, disk: DiskOperations) -> None:
    with open(path, "a") as file:
        file.write(f"{len(disk.log)}\n")


class Player:
    """Plays a script in `folder` whole, and with kills.

    Args:
        server: a multiprocessing context that forks from a process with all of this imported.
        root: what the script leaves, all of it.
    """

    def __init__(self, server, command: list[str], root: Path, scratch: Path):
        self.server, self.command, self.root, self.scratch = server, command, root, scratch
        self.said = scratch / "said"

    def start(self, operation: int | None = None, counted: Path | None = None):
        given = self.command, str(self.said), str(self.root), operation, counted and str(counted)
        process = self.server.Process(target=play, args=given)
        process.start()
        return process

    def whole(self) -> dict[str, str]:
        """What an uninterrupted run leaves; notes how long it takes and how many operations it does."""
        counted = self.scratch / "counted"
        self.clear()
        began = time.monotonic()
        process = self.start(counted=counted)
        process.join(300)
        assert process.exitcode == 0, self.said.read_text()[-3000:]
        self.seconds = time.monotonic() - began
        self.operations = max(map(int, counted.read_text().split()))
        return photograph(self.root)

    def with_kills(self, draw: random.Random) -> tuple[dict[str, str], list[str]]:
        """What a run leaves that is killed up to three times; returns the moments, too."""
        self.clear()
        moments = []
        for _ in range(draw.randint(1, 3)):
            kind = draw.choice(["time", "alone", "operation"])
            at = draw.randint(1, self.operations) if kind == "operation" else draw.uniform(0.05, self.seconds)
            process = self.start(at if kind == "operation" else None)
            process.join(300 if kind == "operation" else at)
            if process.exitcode is None:
                (os.kill if kind == "alone" else os.killpg)(process.pid, signal.SIGKILL)
                process.join()
            elif process.exitcode >= 0:
                break
            moments.append(f"{kind} {at:.4g}")
        process = self.start()
        process.join(300)
        assert process.exitcode == 0, (moments, self.said.read_text()[-3000:])
        assert "Traceback" not in self.said.read_text(), (moments, self.said.read_text()[-3000:])
        return photograph(self.root), moments

    def clear(self) -> None:
        shutil.rmtree(self.root, ignore_errors=True)
        self.said.unlink(missing_ok=True)


def kills(player: Player, number: int, seed: int, say: Callable[[str], None] = print) -> int:
    """Play with at least so many kills; returns how many there were. AssertionError where an end differs."""
    expected, done, trial = player.whole(), 0, 0
    while done < number:
        found, moments = player.with_kills(random.Random(f"{seed} {trial}"))
        differing = differences(found, expected)
        say(f"trial {trial}, killed at {', '.join(moments) or 'no moment'}: {differing or 'equal'}")
        assert not differing, (trial, moments, differing)
        done, trial = done + len(moments), trial + 1
    return done
