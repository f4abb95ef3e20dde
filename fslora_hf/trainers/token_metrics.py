"""SFTTrainer's metrics of tokens, summed where the steps are and gathered from all processes only when they are told.

SFTTrainer gathers them at every micro-batch, in which processes with ragged blocks or idle slots would wait for each
other for ever.
"""

from collections.abc import Callable, MutableMapping
from typing import Any

import torch


class TokenMetrics:
    """Sums over this process's steps since they were last told: entropy, correct and scored tokens; and all tokens.

    Args:
        reduce: sums a tensor over all processes.
    """

    def __init__(self, reduce: Callable[[torch.Tensor], torch.Tensor], device: torch.device):
        self._reduce = reduce
        self._sums = torch.zeros(3, dtype=torch.float64, device=device)
        self._tokens = torch.zeros(1, dtype=torch.float64, device=device)

    def add(self, outputs: Any, tokens: torch.Tensor) -> None:
        """Of a step: the fused head's outputs, and how many tokens it saw."""
        found = outputs.entropy.sum(), outputs.is_top1.sum(), outputs.label_mask.sum()
        self._sums = self._sums.to(tokens.device) + torch.stack([each.detach().double() for each in found])
        self._tokens = self._tokens.to(tokens.device) + tokens.detach().double()

    def count(self) -> int:
        """The tokens of all processes since the last call."""
        seen = int(self._reduce(self._tokens).item())
        self._tokens = torch.zeros_like(self._tokens)
        return seen

    def tell(self, metrics: MutableMapping[str, list]) -> None:
        """Put into `metrics` what SFTTrainer's next log of training takes from there."""
        entropy, correct, scored = self._reduce(self._sums).tolist()
        self._sums = torch.zeros_like(self._sums)
        if scored > 0:
            metrics["entropy"] = [entropy / scored]
            metrics["mean_token_accuracy"] = [correct / scored]
