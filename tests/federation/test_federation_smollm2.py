"""The README's `make federation`: SmolLM2-135M in float32 over real processes, and the simulator's run of the file."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.support import federated
from tests.support.worker_train import ledger

ROOT = Path(__file__).resolve().parents[2]

pytestmark = [pytest.mark.federation, pytest.mark.slow]


def relative_difference(found: dict, expected: dict, side: int) -> float:
    """Frobenius norm of the difference of A (0) or B (1) over that of the expected one, over all modules."""
    both = [(found[name][side].double(), expected[name][side].double()) for name in expected]
    return (sum((a - b).square().sum() for a, b in both) / sum(b.square().sum() for _, b in both)).sqrt().item()


def test_a_federation_of_smollm2_gives_the_simulators_adapter_within_rounding(tmp_path):
    online = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}  # as a user's
    prepare = [sys.executable, "recipes/prepare_model.py"]
    model = subprocess.check_output(prepare, cwd=ROOT, env=online, text=True).strip()
    ready = tmp_path / "ready"  # this environment is
    ready.touch()
    make = ["make", "federation", f"BIN={Path(sys.executable).parent}", f"READY={ready}"]
    done = subprocess.run([*make, f"FEDERATION_FLAGS=--output_dir {tmp_path / 'run'}"], cwd=ROOT, capture_output=True)
    assert done.returncode == 0, done.stdout.decode() + done.stderr.decode()
    recipe = ["--config", "recipes/smollm2_135m/federation.yaml", "--model_name_or_path", model]
    command = [sys.executable, "recipes/train.py", *recipe, "--output_dir", str(tmp_path / "simulated")]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})

    rounds, expected = ledger(tmp_path / "run"), ledger(tmp_path / "simulated")
    for line, other in zip(rounds, expected, strict=True):
        for key in ("clients", "ranks", "weights", "bytes_up", "bytes_down", "refused"):
            assert line[key] == other[key]
        torch.testing.assert_close(line["losses"], other["losses"], rtol=1e-4, atol=0)
    assert len(rounds) == 3 and rounds[0]["ranks"] == [2, 4, 8, 16]
    assert expected[-1]["losses"] != expected[0]["losses"]
    adapters = [federated.saved_adapter(tmp_path / name) for name in ("run", "simulated")]
    # Adam's first steps take the sign of gradients, also of those that are rounding.
    differences = [relative_difference(*adapters, side) for side in (0, 1)]
    print(f"A differs by {differences[0]:.1e}, B by {differences[1]:.1e}")
    assert differences[0] < 1e-3 and differences[1] < 1e-3
    assert b"Stopping the nodes and the SuperLink." in done.stdout
