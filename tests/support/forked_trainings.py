"""Trainings that a comparison starts, forked from its process, which has everything imported."""

import os
import runpy
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import prepare_simple_launcher_cmd_env

import fslora_hf.comparison.launching as launching

at_end: list[Callable[[], None]] = []  # called when a script has ended, in the processes forked from this one, too


class Forked:
    """In place of `subprocess.Popen` of a training script: a fork of this process, which has everything imported."""

    def __init__(self, command: list[str], stdout, stderr, stdin):
        self.code, self.pid = None, os.fork()
        if self.pid == 0:
            code = 1
            try:
                for number in (1, 2):
                    os.dup2(stdout.fileno(), number)
                code = run_main(without_launcher(command[1:]))
            finally:
                os._exit(code)

    def poll(self) -> int | None:
        if self.code is None:
            ended, status = os.waitpid(self.pid, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if ended else None
        return self.code

    def terminate(self) -> None:
        os.kill(self.pid, signal.SIGTERM)

    def wait(self) -> None:
        while self.poll() is None:
            time.sleep(0.01)


def fork_trainings() -> None:
    """The trainings that a comparison starts are forks of its process."""
    launching.subprocess = type("Forks", (), {"Popen": Forked, "STDOUT": None, "DEVNULL": None})
    launching._LOOK = 0.02


def run_main(command: list[str]) -> int:
    """Run a script as `python script ...` would; returns its exit code."""
    sys.argv = command
    try:
        runpy.run_path(command[0], run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code
        if isinstance(code, str):
            print(code, file=sys.stderr)
            code = 1
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 1
    for each in (*at_end, sys.stdout.flush, sys.stderr.flush):
        each()
    return code or 0


def without_launcher(words: list[str]) -> list[str]:
    """What `accelerate launch` starts, in the environment that it gives it; other commands as they are."""
    if words[:3] != ["-m", "accelerate.commands.launch", "--config_file"]:
        return words
    os.environ.update(launched_environment(words[3]))
    return words[4:]


def launched_environment(config: str | Path) -> dict[str, str]:
    """What `accelerate launch --config_file ...` sets."""
    parser = launch_command_parser()
    arguments, *_ = _validate_launch_command(parser.parse_args(["--config_file", str(config), "script.py"]))
    return prepare_simple_launcher_cmd_env(arguments)[1]
