"""Measurements that are processes of their own, so that each has its own peak of memory, and take turns (A B C, A B C,
...), so that a machine whose speed drifts drifts for all."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

Case = TypeVar("Case")
# glibc keeps memory that was freed once, and it is taken again without being seen; not with a fixed threshold.
SEEN = {"MALLOC_MMAP_THRESHOLD_": "65536"}


def run_again(script: str, *arguments: str, environment: Mapping[str, str] = {}) -> Any:
    """The JSON in the last line that `script` prints, run with this process's command line and `arguments` after it.

    Raises:
        RuntimeError: it failed; what it told stands on stderr.
    """
    command = [sys.executable, script, *sys.argv[1:], *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env={**os.environ, **environment})
    if done.returncode:
        raise RuntimeError(f"Expected a measurement with {' '.join(arguments)} to end well, found exit code "
                           f"{done.returncode}: its message stands above.")  # fmt: skip
    return json.loads(done.stdout.splitlines()[-1])


def take_turns(
    cases: Sequence[Case], repeats: int, measure: Callable[[Case], Any], told: Callable[[Case, Any], str]
) -> list[list[Any]]:
    """What `measure` returned for each of the cases, `repeats` times each; progress goes to stderr.

    Args:
        told: a few words on a case and what was measured of it.
    """
    readings: list[list[Any]] = [[] for _ in cases]
    total, start = len(cases) * repeats, time.monotonic()
    for number in range(total):
        place = number % len(cases)
        readings[place].append(measure(cases[place]))
        left = (time.monotonic() - start) / (number + 1) * (total - number - 1)
        words = told(cases[place], readings[place][-1])
        print(f"{number + 1}/{total} {words}, {left / 60:.1f} minutes left", file=sys.stderr, flush=True)
    return readings
