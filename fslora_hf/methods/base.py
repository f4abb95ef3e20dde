"""What a federated LoRA method is: what a client receives, and how the server folds what comes back.

A method knows tensors only: no processes, no trainer, no simulation. The fold has two halves. `accumulate` is
additive, so that neither the order of clients nor the process they were trained in matters: accumulators of several
processes are summed before `finish` turns the sum into the change of the global pair.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

# Module name -> change of A `[rank, in]`, and module name -> change of B `[out, rank]`.
PairChange = tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]


class ServerPair(Protocol):
    """The part of the server's state that a method may read."""

    rank: int
    dense_bytes: int  # of the weights that the pair is added to
    A: dict[str, torch.Tensor]  # module name -> [rank, in]
    B: dict[str, torch.Tensor]  # module name -> [out, rank]


class SketchedClient(Protocol):
    """The part of a client's plan that a method may read."""

    client_id: int
    rank: int
    weight: float  # its share of the round's average; the shares of a cohort sum to 1
    participation: float  # the share of rounds that it takes part in, in the mean
    cohort_rank: int  # the sum of the ranks in its round

    def fresh_rows(self, module: str, features: int) -> np.ndarray:
        """Rows of a new A for this client and round, float64 `[rank, features]`, uniform on +-1/sqrt(features)."""


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
        A: module name -> `[k, in]`; empty if the method does not train A.
        B: module name -> `[out, k]`; empty if the method does not train B.
        weight: the client's share of the round's average.
        sketch: module name -> int64 indices `[k]`.
        received: what the client started the round with.
        position: the client's place in its cohort, from 0.
    """

    A: dict[str, torch.Tensor]
    B: dict[str, torch.Tensor]
    weight: float
    sketch: Callable[[str], np.ndarray]
    received: ClientAdapter
    position: int

    @property
    def returned(self) -> ClientAdapter:
        """The adapter the client ends the round with: what it received and the change, module by module."""
        A, B = (
            {module: start + change[module] if module in change else start for module, start in received.items()}
            for received, change in ((self.received.A, self.A), (self.received.B, self.B))
        )
        return ClientAdapter(A, B, self.received.scale)

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

    def __setitem__(self, name: str, value: torch.Tensor) -> None:
        """Write `value` into the buffer: another tensor in its place would be missing from the sum of processes."""
        if value is not self[name]:  # `tensors[name] += x` has written already
            self[name].copy_(value)


class Method:
    """A federated LoRA method. A subclass writes `receive` and `accumulate`; `finish` is a weighted mean by default.

    One in a file of the user's own is chosen by `method="module:Class"` (`__main__:Class` in the script that runs).

    In a round, every process makes an `accumulator` for the whole cohort. Each client of it is given what `receive`
    returns, trains it, and comes back as a `ClientUpdate`, which the process that trained it passes to `accumulate`,
    unless it was refused. The accumulators of all processes are then summed, and every process calls `finish` on the
    sum and takes the server's step with the change that it returns.

    | a subclass writes | is given | returns |
    |---|---|---|
    | `receive` | global pair, client of rank k, its sketch | A `[k, in]`, B `[out, k]` of every module, scale |
    | `accumulate` | the accumulator, a client's change A `[k, in]`, B `[out, k]` | nothing: adds in place |
    | and, where the defaults do not fit: | | |
    | `accumulator` | global pair, the cohort | `FlatTensors` of zeros, of any shapes that the cohort decides |
    | `finish` | global pair, the sum of all accumulators | change of A `[r, in]`, of B `[out, r]`, or None |
    | `rows` | client of rank k, its sketch | where its rows of A stand in the global A, for `error_feedback` |
    | `weigh` | a client's change | its part in the average, at least 0 |
    | `bytes_moved` | global pair, a client | bytes down, bytes up |
    | `notes` | | numbers for the ledger, by names that it does not have |

    Axes: `r` is the rank of the global adapter, `k` the client's, `in` and `out` the features of the module that the
    pair is added to, `W x + s * scale * B A x` with `s` the global adapter's LoRA scale. Modules are named as they
    were before PEFT wrapped the model, as in `model.layers.0.self_attn.q_proj`. All tensors have the type (float32 or
    float64) and device of the global pair, which no method may write to.

    One instance, made without arguments, serves a whole run; after an interruption a new one serves the rest, so what
    a method must remember from round to round has no place in its attributes. `contract.py` checks what is returned.

    Attributes:
        full_rank_only: every client must have the global rank.
        trains: the sides of the pair that clients train and send; the other stays what it is when a run begins.
        new_basis: `finish` writes the pair in another basis each round, so that only plain averaging (a server step
            of the whole difference, without memory) makes sense.
        beside_global: clients compute with the global adapter as it is, and train what they receive beside it, not in
            its place.
        folds: what `finish` returns is a product of any rank K, A `[K, in]` and B `[out, K]`, that is added to the
            base model's weights and not to the global pair.
    """

    full_rank_only = False
    trains: tuple[str, ...] = ("A", "B")
    new_basis = False
    beside_global = False
    folds = False

    def receive(self, state: ServerPair, client: SketchedClient, sketch: Callable[[str], np.ndarray]) -> ClientAdapter:
        """What `client` starts the round with, as tensors of its own (never views of the server's).

        Args:
            state: the global pair, module name -> A `[r, in]` and B `[out, r]`.
            client: whom it is for; k is `client.rank`.
            sketch: module name -> sorted int64 indices `[k]` below r, drawn at random for this client and round. Use
                them for rows of A and columns of B, or leave them.

        Returns:
            A `[k, in]` and B `[out, k]` of every module, also of a side that is not trained, and `scale`, the client's
            factor on the LoRA scale.
        """
        raise NotImplementedError

    def rows(self, client: SketchedClient, sketch: Callable[[str], np.ndarray]) -> Callable[[str], np.ndarray] | None:
        """Where in the global pair the client's rows of A and columns of B stand: module name -> indices `[k]`.

        What a client holds back of its update from round to round (`error_feedback`) is kept by them. None, the
        default, if they stand for something else each round.
        """
        return None

    def accumulator(self, state: ServerPair, cohort: Sequence[SketchedClient]) -> FlatTensors:
        """Zeros that `accumulate` adds to, the same shapes in every process.

        The default is what `finish` divides: `<module>.A` `[r, in]` and `<module>.B` `[out, r]` of the sides that are
        trained, and `weight` `[1]`. What cannot be summed is given a slot for each client of `cohort`, which only that
        client fills (`update.position`).
        """
        return zeros_like_pair(state, self.mean_shapes(state))

    def mean_shapes(self, state: ServerPair) -> dict[str, tuple[int, ...]]:
        """Shapes of what the default `finish` divides, by name: `weight`, and `<module>.A`, `<module>.B`."""
        shapes: dict[str, tuple[int, ...]] = {"weight": (1,)}
        for module in state.A:
            shapes |= {f"{module}.{side}": tuple(getattr(state, side)[module].shape) for side in self.trains}
        return shapes

    def weigh(self, update: ClientUpdate) -> float:
        """The client's part in the average; all parts are divided by their sum, here and in the ledger's `weights`."""
        return update.weight

    def accumulate(self, accumulator: FlatTensors, update: ClientUpdate) -> None:
        """Add one client's update, in place and so that the order of clients does not matter.

        Args:
            accumulator: what `accumulator` returned, perhaps with other clients in it. With the default `finish`, add
                the update times `update.weight`, and `update.weight` to `weight`.
            update: the client's change, A `[k, in]` and B `[out, k]` by module (a side that is not trained is empty).
        """
        raise NotImplementedError

    def finish(self, state: ServerPair, accumulator: FlatTensors) -> PairChange | None:
        """The change of A `[r, in]` and of B `[out, r]` of every module, None if no update came.

        A side that is not trained is left out (an empty dict). The server adds the change to the global pair, or lets
        its optimizer take it for a negative gradient. The default is the mean over the accepted weight, so that
        refused updates leave the others' shares in proportion.
        """
        weight = accumulator["weight"]
        if weight.item() == 0.0:
            return None
        A, B = (
            {module: accumulator[f"{module}.{side}"] / weight for module in state.A} if side in self.trains else {}
            for side in ("A", "B")
        )
        return A, B

    def bytes_moved(self, state: ServerPair, client: SketchedClient) -> tuple[int, int]:
        """Bytes that cross the wire in a round, to `client` and back: its part of the sides that are trained."""
        pair = [tensor for side in self.trains for tensor in getattr(state, side).values()]
        moved = client.rank * sum(tensor.numel() // state.rank * tensor.element_size() for tensor in pair)
        return moved, moved

    def notes(self) -> dict[str, float]:
        """Numbers of the last `finish` that the round ledger shall hold, by name."""
        return {}


def zeros_like_pair(state: ServerPair, shapes: Mapping[str, tuple[int, ...]]) -> FlatTensors:
    """Zeros of these shapes, of the global pair's type and on its device."""
    some = next(iter(state.A.values()))
    return FlatTensors(shapes, some.dtype, some.device)


def first_rows(state: ServerPair, rank: int) -> ClientAdapter:
    """Copies of the first `rank` rows of A and columns of B, at the global adapter's own scale."""
    A = {module: tensor[:rank].detach().clone() for module, tensor in state.A.items()}
    B = {module: tensor[:, :rank].detach().clone() for module, tensor in state.B.items()}
    return ClientAdapter(A, B, scale=1.0)


def beside(state: ServerPair, adapter: ClientAdapter) -> ClientAdapter:
    """The global adapter and a client's beside it as one, of the sum of their ranks; the client's alone if the global
    one adds nothing."""
    if not any(B.any() for B in state.B.values()):
        return adapter
    A = {module: torch.cat([state.A[module].detach(), rows]) for module, rows in adapter.A.items()}
    B = {m: torch.cat([state.B[m].detach(), columns * adapter.scale], dim=1) for m, columns in adapter.B.items()}
    return ClientAdapter(A, B, scale=1.0)
