"""States that a model is in while it is scored, and out of again afterwards."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft import PeftModel
from peft.tuners.lora.layer import Linear, LoraLayer
from torch import nn


@contextmanager
def scoring(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients and in the model's own precision, and everything as it was afterwards.

    A model that accelerate has prepared for bf16 training computes under autocast, whoever calls it; scores would then
    depend on whether training came before (accelerate 1.15.0 keeps the model's own forward in `_original_forward`).
    Not inference mode: a model may keep what it computes here, such as 4-bit weights repacked for a processor, and go
    on training with it.
    """
    modes = [(module, module.training) for module in model.modules()]
    prepared = model.__dict__.get("forward") if "_original_forward" in model.__dict__ else None
    model.eval()
    try:
        if prepared is not None:
            model.forward = model.__dict__["_original_forward"]
        with torch.no_grad():
            yield
    finally:
        if prepared is not None:
            model.forward = prepared
        for module, training in modes:
            module.training = training


@contextmanager
def merged(model: nn.Module) -> Iterator[None]:
    """The active LoRA adapters folded into the base's weights, where that loses nothing; as it was afterwards.

    The weights are exchanged and put back, not added to and subtracted from, so that no bit of the base changes. Left
    alone is a model with quantized or half-precision weights, which a fold would round, or with other adapters.
    """
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    if not isinstance(model, PeftModel) or not layers or not all(map(_can_merge, layers)):
        yield
        return
    own = [(layer.get_base_layer().weight, layer.get_base_layer().weight.data) for layer in layers]
    try:
        for layer, (weight, data) in zip(layers, own, strict=True):
            for adapter in layer.active_adapters:
                if adapter in layer.lora_A:
                    data = data + layer.get_delta_weight(adapter).to(data.dtype)
            weight.data = data
        with model.disable_adapter():
            yield
    finally:
        for weight, data in own:
            weight.data = data


def _can_merge(layer: LoraLayer) -> bool:
    plain = type(layer) is Linear and not layer.merged and not layer.disable_adapters
    exact = layer.get_base_layer().weight.dtype in (torch.float32, torch.float64)
    return plain and exact and not any(layer.lora_variant.get(name) for name in layer.active_adapters)
