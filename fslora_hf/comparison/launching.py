"""Runs, one after the other: each a process of its own, resumed where it stopped, its output kept in a log."""

import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from ..storage import disk_errors
from ..storage.locks import lock_file
from .folder import Folder
from .results import is_done, is_started, rounds_and_bytes, share_done
from .runs import Run

TAIL = 15  # lines of a failed run's log that are shown
_LOOK = 0.5  # seconds between two looks at a run


@dataclass
class Launcher:
    """Starts runs with `script` (recipes/train.py), under accelerate if a configuration of its is named."""

    folder: Folder
    script: Path
    accelerate_config: str | None = None

    def command(self, run: Run) -> list[str]:
        launcher = []
        if self.accelerate_config:
            launcher = ["-m", "accelerate.commands.launch", "--config_file", self.accelerate_config]
        words = [sys.executable, *launcher, str(self.script), "--config", str(self.folder.recipe(run.name))]
        resume = ["--resume_from_checkpoint", "true"] if is_started(self.folder.run(run.name)) else []
        return [*words, *resume]

    def finish(self, run: Run, watch: Callable[[], None]) -> bool:
        """Bring a run to its end, whether it has not begun, was stopped, or is still at it; True if that worked.

        `watch` is called every now and then meanwhile.
        """
        with disk_errors.told(self.folder.log(run.name)):
            log = open(self.folder.log(run.name), "a", encoding="utf-8")  # noqa: SIM115  (closed by the next line)
        with log:
            # Every process of a run has inherited its log, locked: what a killed comparison left running goes on, and
            # a second process in its folder would spoil it.
            while lock_file(log.fileno()) is False:
                watch()
                time.sleep(_LOOK)
            if not is_done(run, self.folder.run(run.name)):
                self._start(run, log, watch)
        return is_done(run, self.folder.run(run.name))

    def _start(self, run: Run, log: IO[str], watch: Callable[[], None]) -> None:
        process = subprocess.Popen(self.command(run), stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
        try:
            while process.poll() is None:
                watch()
                time.sleep(_LOOK)
        finally:
            if process.poll() is None:  # the comparison itself was interrupted
                process.terminate()
                process.wait()


@dataclass
class Progress:
    """Lines on `stream` that say how far a comparison is and how long it may take."""

    runs: Sequence[Run]
    folder: Folder
    stream: IO[str] = field(default_factory=lambda: sys.stderr)
    every: float = 30.0  # seconds between lines where they cannot replace one another

    def __post_init__(self):
        self._started = time.monotonic()
        self._before = self._done()
        self._shown = -float("inf")

    def _done(self) -> float:
        return sum(share_done(run, self.folder.run(run.name)) for run in self.runs)

    def seconds_left(self) -> float | None:
        """For all runs, at the pace of this session; None before anything is finished."""
        gained = self._done() - self._before
        if gained <= 0:
            return None
        return (time.monotonic() - self._started) / gained * (len(self.runs) - self._before - gained)

    def show(self, run: Run) -> None:
        """Say how far `run` is, unless that was just said."""
        moving, now = self.stream.isatty(), time.monotonic()
        if now - self._shown < (2.0 if moving else self.every):
            return
        self._shown = now
        rounds = rounds_and_bytes(self.folder.run(run.name))[0]
        left = self.seconds_left()
        time_left = "time left unknown yet" if left is None else f"about {told(left)} left in all"
        number = list(self.runs).index(run) + 1
        text = f"run {number} of {len(self.runs)}, {run.name}: round {rounds} of {run.args.num_rounds}, {time_left}"
        print(f"\r{text:<100}" if moving else text, end="" if moving else "\n", file=self.stream, flush=True)

    def say(self, text: str) -> None:
        """A line that stays."""
        start = "\r" if self.stream.isatty() else ""
        print(f"{start}{text:<100}".rstrip(" "), file=self.stream, flush=True)
        self._shown = -float("inf")


def told(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def run_all(runs: Sequence[Run], launcher: Launcher, progress: Progress) -> list[Run]:
    """Finish every run that is not finished; returns those that failed, each with its log's end said."""
    failed = []
    for number, run in enumerate(runs, 1):
        folder = launcher.folder.run(run.name)
        place = f"run {number} of {len(runs)}, {run.name}"
        if is_done(run, folder):
            progress.say(f"{place}: done already")
            continue
        started = time.monotonic()
        progress.say(f"{place}: {'goes on' if is_started(folder) else 'starts'}")
        if launcher.finish(run, lambda run=run: progress.show(run)):
            progress.say(f"{place}: done in {told(time.monotonic() - started)}")
        else:
            failed.append(run)
            log = launcher.folder.log(run.name)
            progress.say(f"{place}: failed; the end of {log}:\n{tail(log)}")
    return failed


def tail(log: Path) -> str:
    """The last lines of a log, indented."""
    lines = log.read_text(encoding="utf-8", errors="replace").replace("\r", "\n").splitlines()
    return "\n".join(f"    {line}" for line in [line for line in lines if line.strip()][-TAIL:])
