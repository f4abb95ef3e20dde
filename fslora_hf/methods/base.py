"""What a federated LoRA method is: what a client receives, and how the server folds what comes back.

A method knows tensors only: no processes, no trainer, no simulation. The fold has two halves. `accumulate` is
additive, so that neither the order of clients nor the process they were trained in matters: accumulators of several
processes are summed before `finish` turns the sum into the change of the global pair.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch


class ServerPair(Protocol):
    """The part of the server's state that a method may read."""

    rank: int
    A: dict[str, torch.Tensor]  # module name -> [rank, in]
    B: dict[str, torch.Tensor]  # module name -> [out, rank]


class SketchedClient(Protocol):
    """The part of a client's plan that a method may read."""

    rank: int
    weight: float


@dataclass(frozen=True)
class ClientAdapter:
    """What a client holds: a LoRA adapter of its own rank k.

    Attributes:
        A: module name -> `[k, in]`.
        B: module name -> `[out, k]`.
        scale: factor on the global adapter's LoRA scale, in the client's forward pass.
    """

    A: dict[str, torch.Tensor]
    B: dict[str, torch.Tensor]
    scale: float


@dataclass(frozen=True)
class ClientUpdate:
    """What a client sends back: the change of what it held.

    Attributes:
        A: module name -> `[k, in]`.
        B: module name -> `[out, k]`.
        weight: the client's share of the round's average.
        sketch: module name -> int64 indices `[k]`.
    """

    A: dict[str, torch.Tensor]
    B: dict[str, torch.Tensor]
    weight: float
    sketch: Callable[[str], np.ndarray]

    def norm(self) -> torch.Tensor:
        """Frobenius norm over all modules, in float64 so that a sum of finite values stays finite (scalar tensor)."""
        parts = [torch.linalg.vector_norm(t, dtype=torch.float64) for pair in (self.A, self.B) for t in pair.values()]
        return torch.linalg.vector_norm(torch.stack(parts))


class FlatTensors(dict[str, torch.Tensor]):
    """Named tensors that are views of one flat buffer, `flat`, so that one all-reduce sums them all."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, device: torch.device | str):
        sizes = [math.prod(shape) for shape in shapes.values()]
        self.flat = torch.zeros(sum(sizes), dtype=dtype, device=device)
        pieces = self.flat.split(sizes)
        super().__init__(
            {name: piece.view(shape) for (name, shape), piece in zip(shapes.items(), pieces, strict=True)}
        )


class Method:
    """A federated LoRA method. Subclasses write `receive` and `accumulate`; `finish` is a weighted mean by default."""

    full_rank_only = False

    def receive(self, state: ServerPair, client: SketchedClient, sketch: Callable[[str], np.ndarray]) -> ClientAdapter:
        """What `client` starts the round with, as tensors of its own (never views of the server's)."""
        raise NotImplementedError

    def accumulator(self, state: ServerPair) -> FlatTensors:
        """Zeros that `accumulate` adds to: the shapes of the global pair, and the accepted weight."""
        shapes: dict[str, tuple[int, ...]] = {"weight": (1,)}
        for module in state.A:
            shapes[f"{module}.A"], shapes[f"{module}.B"] = tuple(state.A[module].shape), tuple(state.B[module].shape)
        some = next(iter(state.A.values()))
        return FlatTensors(shapes, some.dtype, some.device)

    def accumulate(self, accumulator: FlatTensors, update: ClientUpdate) -> None:
        """Add one client's update, in place."""
        raise NotImplementedError

    def finish(
        self, state: ServerPair, accumulator: FlatTensors
    ) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]] | None:
        """The average update of A and of B (module name -> the global pair's shapes), None if no update came.

        The mean is over the accepted weight, so that refused updates leave the others' shares in proportion.
        """
        weight = accumulator["weight"]
        if weight.item() == 0.0:
            return None
        A = {module: accumulator[f"{module}.A"] / weight for module in state.A}
        B = {module: accumulator[f"{module}.B"] / weight for module in state.B}
        return A, B
