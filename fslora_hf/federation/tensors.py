"""Tensors as they are in packets, and back."""

from collections.abc import Mapping

import numpy as np
import torch


def to_numpy(pair: Mapping[str, Mapping[str, torch.Tensor]]) -> dict[str, np.ndarray]:
    """Tensors by side and module as arrays named `<side>.<module>`."""
    return {
        f"{side}.{module}": tensor.detach().cpu().numpy()
        for side, tensors in pair.items()
        for module, tensor in tensors.items()
    }


def to_tensor(array: np.ndarray, like: torch.Tensor) -> torch.Tensor:
    """A copy of an array of a packet, which is read-only, where `like` is."""
    return torch.from_numpy(array.copy()).to(like.device)
