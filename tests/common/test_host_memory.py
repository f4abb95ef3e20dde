"""What a process holds is measured, and what it frees is kept for the next step while a run trains."""

import os
import platform
import subprocess
import sys

import pytest
import torch

from fslora_hf.common import host_memory
from fslora_hf.trainers import federated as trainer
from tests.support.worker_train import build

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs Linux with the GNU C library")

# Each in a process of its own: the allocator's settings are the process's, for good.
FAULTS = """
import resource, torch
from fslora_hf import host_memory
print(host_memory.keep_freed_memory())
step = lambda: [torch.ones(2**21) for _ in range(12)]  # 96 MiB
for _ in range(8):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
held = host_memory.held_bytes()
host_memory.return_freed_memory()
print(held - host_memory.held_bytes())
"""
METER = """
import torch
from fslora_hf import host_memory
from fslora_hf.trainers.block_size import HostMeter
host_memory.keep_freed_memory()
[torch.ones(2**21) for _ in range(30)]
meter = HostMeter()
print([int(meter.peak(lambda n=n: [torch.ones(2**18) for _ in range(n)])) for n in (40, 160, 0)])
"""


def output_of(script: str, **environment: str) -> list[str]:
    variables = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, env={**variables, **environment}, check=True)
    return done.stdout.splitlines()


def test_freed_memory_is_kept_until_it_is_returned():
    """And not where the user has set the allocator."""
    kept, faults, returned = output_of(FAULTS)
    as_set, cleared_again, _ = output_of(FAULTS, MALLOC_MMAP_THRESHOLD_="131072")
    assert (kept, as_set) == ("True", "False")
    assert int(faults) < int(cleared_again) / 10 and int(returned) > 90e6


def test_a_step_is_measured_by_itself_where_freed_memory_is_kept():
    """Neither what an earlier, larger step left nor what was kept before is taken for the step's own."""
    small, large, nothing = eval(output_of(METER)[-1])
    assert 30e6 < small < 80e6 and 150e6 < large < 220e6 and nothing < 30e6


def test_another_system_is_left_alone(monkeypatch):
    monkeypatch.setattr(host_memory.ctypes, "CDLL", lambda name: object())
    assert host_memory.keep_freed_memory() is False
    host_memory.return_freed_memory()


@pytest.mark.parametrize("fails", [False, True])
def test_a_run_on_the_cpu_keeps_freed_memory_and_returns_it(tmp_path, monkeypatch, fails):
    calls = []
    monkeypatch.setattr(host_memory, "keep_freed_memory", lambda: calls.append("keep") or True)
    monkeypatch.setattr(host_memory, "return_freed_memory", lambda: calls.append("return"))
    made = build(tmp_path, {"num_rounds": 1, "local_steps": 1, "client_ranks": [1, 2, 4, 6, 3]})
    assert made.args.device == torch.device("cpu") and calls == []
    if fails:
        monkeypatch.setattr(trainer, "find_start", None)
        with pytest.raises(TypeError):
            made.train()
    else:
        made.train()
    assert calls == ["keep", "return"]
