"""What rounds add to the base model (`method: flora`), brought to nodes that have bases of their own."""

from collections.abc import Mapping

import numpy as np
import torch

from ..methods import PairChange
from ..models.folding import FoldedBase
from .tensors import to_numpy

FOLD, BASE = "fold", "base"  # what names of tensors in packets begin with


class Folds:
    """The stacks of rounds that some node may lack; where these are more than the weights, or gone, the weights.

    Args:
        base: the server's, which already holds all of them.
    """

    def __init__(self, base: FoldedBase):
        self._base = base
        self._stacks: dict[int, dict[str, np.ndarray]] = {}

    def note(self, round: int, change: PairChange | None) -> None:
        """Keep what a round added: A `[K, in]` and B `[out, K]` by module, None for nothing."""
        self._stacks[round] = {} if change is None else to_numpy(dict(zip("AB", change, strict=True)))
        while self.bytes > self._base.bytes:  # from here on, the weights are less
            del self._stacks[min(self._stacks)]

    @property
    def bytes(self) -> int:
        """Of all stacks that are kept."""
        return sum(array.nbytes for arrays in self._stacks.values() for array in arrays.values())

    def forget(self, before: int) -> None:
        """Drop the stacks of rounds that all nodes have."""
        for round in [round for round in self._stacks if round < before]:
            del self._stacks[round]

    def since(self, round: int, now: int) -> dict[str, np.ndarray]:
        """Tensors for a node whose base holds the rounds before `round`, with which it holds those before `now`."""
        missing = range(round, now)
        if all(each in self._stacks for each in missing):
            return {f"{FOLD}.{each}.{name}": array for each in missing
                    for name, array in self._stacks[each].items()}  # fmt: skip
        return {f"{BASE}.{module}": _bits(weight) for module, weight in self._base.weights.items()}


def bring_up(base: FoldedBase, tensors: Mapping[str, np.ndarray], dtype: str, have: int, now: int) -> None:
    """Give a node's base what `Folds.since` says.

    Args:
        tensors: of a packet; others than those of the base are passed over.
        dtype: of the server's base, as `bfloat16`.
        have: the node's base holds the rounds before this one; the server may think it to be behind.
    """
    weights = {module: tensors[f"{BASE}.{module}"] for module in base.weights if f"{BASE}.{module}" in tensors}
    for module, bits in weights.items():
        base.weights[module].data.copy_(torch.from_numpy(bits.copy()).view(getattr(torch, dtype)))
    for round in range(have, now):
        stack = {side: {module: f"{FOLD}.{round}.{side}.{module}" for module in base.weights} for side in "AB"}
        if stack["A"][next(iter(base.weights))] in tensors:
            base.fold(*({module: _like(tensors[name], base.weights[module]) for module, name in names.items()}
                        for names in stack.values()))  # fmt: skip


def _like(array: np.ndarray, weight: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(array.copy()).to(weight.device)


def _bits(weight: torch.Tensor) -> np.ndarray:
    """A weight as numpy has it, or, where numpy has no such type, its bits."""
    weight = weight.detach().cpu().contiguous()
    return (weight.view(torch.int16) if weight.dtype == torch.bfloat16 else weight).numpy()
