"""4-bit bases on a CPU, as bitsandbytes 0.50.2 has them."""

from collections.abc import Iterator

from torch import nn

_REPACKS = "support_avx512bf16_for_cpu"  # of bitsandbytes' Linear4bit


def keep_as_stored(model: nn.Module) -> None:
    """Have 4-bit layers compute with the weights as they were quantized, whatever the CPU can do.

    On a CPU with AVX512-BF16, bitsandbytes would repack a layer's weights for good at its first forward pass in
    evaluation mode: their scales are rounded to bfloat16, and no gradient passes through the layer any more, without a
    word. Scores would depend on the CPU, and training after an evaluation would be wrong.
    """
    for module in model.modules():
        if hasattr(module, _REPACKS):
            setattr(module, _REPACKS, False)


def check_as_stored(model: nn.Module) -> Iterator[str]:
    """Problems of a base that cannot be trained on any more."""
    for name, module in model.named_modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if getattr(state, "packing_format_for_cpu", False):
            yield (f"Expected 4-bit weights as they were loaded, found {name} repacked for inference on this CPU: "
                   "load the model anew, and evaluate it with fslora_hf or after training.")  # fmt: skip
            return
