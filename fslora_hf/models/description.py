"""What a loaded base model and an adapter are called in results and cards, and digests by which they are known."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel


@dataclass(frozen=True)
class ModelSource:
    """A base model: the name it was loaded by, its revision there, how it was loaded, and a hash of its weights."""

    name: str
    digest: str
    revision: str | None = None
    dtype: str | None = None
    quantization: str | None = None


def describe_model(model: PreTrainedModel) -> ModelSource:
    """A loaded base model as result files name it; its revision is the commit it was fetched at, if it was."""
    commit = getattr(model.config, "_commit_hash", None)
    dtype = str(model.dtype).removeprefix("torch.")
    return ModelSource(model.config.name_or_path, _base_digest(model), commit, dtype, quantization_of(model))


def quantization_of(model: PreTrainedModel) -> str | None:
    """`4-bit`, `8-bit`, or None for a model whose weights are not quantized."""
    return next((f"{bits}-bit" for bits in (4, 8) if getattr(model, f"is_loaded_in_{bits}bit", False)), None)


def _base_digest(model: nn.Module) -> str:
    """16 hexadecimal digits that change when a base's weights do: of up to 64 values of each tensor, adapters aside.

    Hashing all of a large model would take longer than scoring a few questions; training or merging changes them all.
    """
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if "lora_" in name or "client_" in name:
            continue
        values = parameter.detach().flatten()
        some = values[:: max(1, len(values) // 64)][:64].cpu()
        some = some if some.dtype in (torch.uint8, torch.int8) else some.float()
        digest.update(f"{name.replace('.base_layer', '')} {tuple(parameter.shape)}".encode() + some.numpy().tobytes())
    return digest.hexdigest()[:16]


def adapter_digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """16 hexadecimal digits of the SHA-256 of an adapter's tensors in float32, by their names in its file."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode() + b"\0")
        digest.update(tensors[name].detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
