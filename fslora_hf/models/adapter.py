"""The adapter of a PEFT model as the pair that rounds know: its tensors by module, read, widened and written."""

from pathlib import Path

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora.layer import LoraLayer
from safetensors.torch import save_file
from torch import nn

from ..methods import ClientAdapter
from ..storage.files import whole_files
from ..storage.tensor_file import as_wide, read_tensors

PEFT_PREFIX = "base_model.model."


def lora_layers(model: PeftModel, adapter_name: str = "default") -> dict[str, LoraLayer]:
    """The adapter's layers by the name each module had before PEFT wrapped the model, in the model's order."""
    return {
        name.removeprefix(PEFT_PREFIX): module
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer) and adapter_name in module.lora_A
    }


def global_pair(model: PeftModel, adapter_name: str = "default") -> tuple[dict[str, nn.Parameter], ...]:
    """The adapter's own tensors, not copies: module name -> A `[r, in]`, and module name -> B `[out, r]`."""
    layers = lora_layers(model, adapter_name)
    A = {name: layer.lora_A[adapter_name].weight for name, layer in layers.items()}
    return A, {name: layer.lora_B[adapter_name].weight for name, layer in layers.items()}


def read_global_pair(model: PeftModel, path: str | Path) -> tuple[dict[str, torch.Tensor], ...]:
    """The pair in a file that PEFT wrote of such an adapter, `default`: module name -> A, and -> B; changes nothing.

    Raises:
        CheckpointError: it holds anything else.
    """
    pair = global_pair(model)
    names = [{name: f"{PEFT_PREFIX}{name}.lora_{side}.weight" for name in pair[0]} for side in "AB"]
    wanted = {names[side][name]: as_wide(tensor) for side in (0, 1) for name, tensor in pair[side].items()}
    saved = read_tensors(Path(path), wanted)
    return tuple({name: saved[written] for name, written in side.items()} for side in names)


def widen_adapter(model: PeftModel, adapter_name: str = "default") -> None:
    """Hold the global adapter in at least float32: TRL casts adapters of quantized models to bfloat16, in which small
    averaged changes would be lost."""
    for tensors in global_pair(model, adapter_name):
        for parameter in tensors.values():
            parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))


def save_client_adapter(path: str | Path, adapter: ClientAdapter, config: LoraConfig) -> None:
    """Write a client's adapter as a PEFT adapter of its own rank, which plain PEFT loads.

    Args:
        path: the folder to write; made if missing.
        adapter: what the client holds.
        config: the global adapter's configuration.

    A client of rank k computes with `adapter.scale` times the global LoRA scale (alpha / r, or alpha / sqrt(r) with
    rsLoRA). As a plain adapter of rank k without rsLoRA that is a `lora_alpha` of k times this scale.
    """
    rank = next(iter(adapter.A.values())).shape[0]
    factor = adapter.scale * rank / (config.r**0.5 if config.use_rslora else config.r)
    exported = LoraConfig(**config.to_dict())
    exported.r, exported.use_rslora, exported.inference_mode = rank, False, True
    exported.lora_alpha = config.lora_alpha * factor
    exported.alpha_pattern = {pattern: alpha * factor for pattern, alpha in config.alpha_pattern.items()}
    tensors = {f"{PEFT_PREFIX}{name}.lora_A.weight": tensor.contiguous() for name, tensor in adapter.A.items()}
    tensors |= {f"{PEFT_PREFIX}{name}.lora_B.weight": tensor.contiguous() for name, tensor in adapter.B.items()}
    with whole_files(path) as folder:
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        exported.save_pretrained(str(folder))
