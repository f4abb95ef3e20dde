"""What every test shares: no network, one thread, quiet bars, and the folder of real rows."""

import gc
import os
import sys
import tempfile
from pathlib import Path

# Before any Hugging Face import, and inherited by the processes that tests start. One thread: the models are tiny, and
# the processes of a test would fight over the cores.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
_CACHE = tempfile.TemporaryDirectory(prefix="fslora-test-")  # gone when the session ends
os.environ["HF_CACHE"] = _CACHE.name
os.environ["HF_MODULES_CACHE"] = _CACHE.name + "/modules"  # where `evaluate` copies metrics to
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = "1"

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])

import pytest  # noqa: E402  (the environment comes first)
import torch  # noqa: E402

torch.set_num_threads(1)
pytest.register_assert_rewrite("tests.support.worker_train")


def pytest_collection_finish() -> None:
    """A run of a trainer collects garbage, for which all that was imported need not be looked through every time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def commonsense_dir() -> Path:
    """The folder of real rows, `<folder>/<task>/{train,test}.json`."""
    named = os.environ.get("FSLORA_COMMONSENSE_DIR")
    if not named:
        pytest.skip("Expected real rows, found none: set FSLORA_COMMONSENSE_DIR to their folder.")
    assert Path(named).is_dir(), f"Expected FSLORA_COMMONSENSE_DIR to name a folder, found {named}: mend or unset it."
    return Path(named)
