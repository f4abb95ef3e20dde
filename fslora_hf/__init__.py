"""Federated Sketching LoRA as a Hugging Face Trainer extension."""

import logging
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .callbacks import RoundCallback
    from .config import FederatedSketchConfig
    from .trainer import FederatedSketchTrainer

_HOMES = {
    "FederatedSketchConfig": ".config",
    "FederatedSketchTrainer": ".trainer",
    "RoundCallback": ".callbacks",
}
__all__ = ["FederatedSketchConfig", "FederatedSketchTrainer", "RoundCallback"]


# On some CPUs bitsandbytes asks for a package with a kernel for inference when it is imported; quantized.py has it use
# none, so that scores are those of any other machine.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(lambda record: "gemm_4bit_forward" not in str(record.msg))


def __getattr__(name: str):
    """Load a public name when it is first asked for, so that `fslora_hf.sketch` or the data do not wait for TRL."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name], __name__), name)
