"""What part of the device's matrix rate a local step reaches: floating-point operations of a token, and the rate.

A matrix product costs two operations a weight and token. With W the weights of the base's linear layers but the LM
head, V those of the head, s the share of tokens that are scored, and p the weights of a client's pair, rank times
(in + out) summed over adapted layers, a token costs

    4 W  (forward, and backward through activations: the base is frozen)
  + 4 V s  (the same of the head, which only scored tokens need)
  + 6 p  (forward, backward through activations, and backward to the weights).

Left out are attention scores, norms and the optimizer, so the part reached is a little understated; what a trainer
computes beyond this (padding of low ranks, the head at tokens that are not scored) counts as time and not as work.
"""

import statistics
import time


def flops_per_token(model, rank: float, scored: float) -> float:
    """Operations that a token of training takes at least.

    Args:
        model: a PEFT model.
        rank: of the clients, in the mean.
        scored: share of tokens with a loss.
    """
    from peft.tuners.lora import LoraLayer
    from torch import nn

    base, head = model.get_base_model(), model.get_base_model().get_output_embeddings()
    adapted = [module for module in base.modules() if isinstance(module, LoraLayer)]
    skipped = {part for layer in adapted for side in (layer.lora_A, layer.lora_B) for part in side.values()} | {head}
    linear = [module for module in base.modules() if isinstance(module, nn.Linear) and module not in skipped]
    weights = sum(module.weight.numel() for module in linear)
    wide = sum(layer.in_features + layer.out_features for layer in adapted)
    return 4.0 * weights + 4.0 * head.weight.numel() * scored + 6.0 * rank * wide


def matrix_rate(dtype, device: str, size: int | None = None, repeats: int = 5) -> float:
    """Operations a second of a product of two square matrices, the median of some after one that is not counted.

    Args:
        size: rows of the matrices; 8192 on a GPU and 2048 elsewhere, where larger ones are no faster.
    """
    import torch

    size = size or (8192 if device == "cuda" else 2048)
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    seconds = []
    for _ in range(repeats + 1):
        wait()
        start = time.perf_counter()
        torch.matmul(left, right)
        wait()
        seconds.append(time.perf_counter() - start)
    return 2.0 * size**3 / statistics.median(seconds[1:])
