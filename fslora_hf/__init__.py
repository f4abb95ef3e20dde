"""Federated Sketching LoRA as a Hugging Face Trainer extension."""

import logging
from importlib import import_module
from typing import TYPE_CHECKING

from .moved import find_moved

if TYPE_CHECKING:
    from .config.federation import FederatedSketchConfig
    from .trainers.callbacks import RoundCallback
    from .trainers.sft import FederatedSketchTrainer

_HOMES = {
    "FederatedSketchConfig": ".config.federation",
    "FederatedSketchTrainer": ".trainers.sft",
    "RoundCallback": ".trainers.callbacks",
}
__all__ = ["FederatedSketchConfig", "FederatedSketchTrainer", "RoundCallback"]

find_moved()

# On some CPUs bitsandbytes asks for a package with a kernel for inference when it is imported; models/quantized.py has
# it use none, so that scores are those of any other machine.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(lambda record: "gemm_4bit_forward" not in str(record.msg))


def __getattr__(name: str):
    """Load a public name when it is first asked for, so that sketches or the data do not wait for TRL."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name], __name__), name)
