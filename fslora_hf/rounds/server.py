"""The server's state: the global pair, the server optimizer, and their file (safetensors, no pickle)."""

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import save_file

from ..storage.state_file import CheckpointError
from ..storage.tensor_file import Wanted, as_wide, read_tensors, tensor_shapes

_OPTIMIZERS = {
    "sgd": (torch.optim.SGD, {}),
    "sgd_momentum": (torch.optim.SGD, {"momentum": 0.9}),
    "adam": (torch.optim.Adam, {}),
    "adamw": (torch.optim.AdamW, {"weight_decay": 0.0}),
}
_KEPT = {  # names of what an optimizer keeps of a parameter that has stepped
    torch.optim.SGD: ("momentum_buffer",),  # without momentum nothing, not this either
    torch.optim.Adam: ("step", "exp_avg", "exp_avg_sq"),
    torch.optim.AdamW: ("step", "exp_avg", "exp_avg_sq"),
}


class Base(Protocol):
    """The base model's weights, where a method changes them."""

    bytes: int  # of all of them

    def fold(self, A: Mapping[str, torch.Tensor], B: Mapping[str, torch.Tensor]) -> float:
        """Add the products of A `[K, in]` and B `[out, K]`, by module; returns the squared norm of the rounding."""


class ServerState:
    """The global adapter and the optimizer that moves it.

    The tensors are those of the model's global adapter, not copies, so that the model always holds the global adapter.

    Args:
        A: module name -> `[rank, in]`, float32 or float64.
        B: module name -> `[out, rank]`.
        optimizer: `sgd` (at rate 1 plain averaging), `sgd_momentum`, `adam` or `adamw`: torch's with torch's
            defaults (momentum 0.9) and no weight decay, which would shrink coordinates that no client trained.
        learning_rate: of the server.
        base: for a method that folds: takes what the global pair would.
    """

    def __init__(
        self,
        A: dict[str, torch.Tensor],
        B: dict[str, torch.Tensor],
        optimizer: str = "sgd",
        learning_rate: float = 1.0,
        base: Base | None = None,
    ):
        self.A, self.B, self.base = A, B, base
        self._fold_error = 0.0
        self.rank = next(iter(A.values())).shape[0]
        self._parameters = {f"{module}.A": tensor for module, tensor in A.items()}
        self._parameters |= {f"{module}.B": tensor for module, tensor in B.items()}
        kind, options = _OPTIMIZERS[optimizer]
        self._optimizer = kind(self._parameters.values(), lr=learning_rate, **options)

    @property
    def bytes_per_rank(self) -> int:
        """Bytes of one row of A and one column of B of every module: what a client's rank is multiplied with."""
        floats = sum(A.shape[1] for A in self.A.values()) + sum(B.shape[0] for B in self.B.values())
        return floats * next(iter(self.A.values())).element_size()

    @property
    def dense_bytes(self) -> int:
        """Bytes of the weights that the pair is added to: the base's own, or as large as in the adapter's type."""
        if self.base is not None:
            return self.base.bytes
        return sum(A.shape[1] * self.B[name].shape[0] * A.element_size() for name, A in self.A.items())

    @torch.no_grad()
    def step(self, update: tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]] | None) -> None:
        """Apply the average update of A and B, the negative of a gradient; None (no usable update) changes nothing.

        What the update leaves out has no gradient, and so neither a step nor a state.
        """
        self._fold_error = 0.0
        if update is None:
            return
        if self.base is not None:
            self._fold_error = self.base.fold(*update)
            return
        for tensors, changes in ((self.A, update[0]), (self.B, update[1])):
            for module, change in changes.items():
                tensors[module].grad = -change
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def notes(self) -> dict[str, float]:
        """Numbers of the last step for the round ledger."""
        return {} if self.base is None else {"fold_error": self._fold_error}

    def save(self, path: str | Path) -> None:
        """Write the optimizer's state. The global pair itself is the checkpoint's PEFT adapter, exactly."""
        state = self._optimizer.state
        tensors = {
            f"{name}.{key}": value.contiguous()
            for name, parameter in self._parameters.items()
            for key, value in state.get(parameter, {}).items()
            if value is not None
        }
        save_file(tensors, path)

    def read(self, path: str | Path, rounds: int) -> dict[str, torch.Tensor]:
        """What `save` wrote after `rounds` rounds, for the same modules and optimizer; changes nothing.

        Raises:
            CheckpointError: it holds anything else.
        """
        names = tensor_shapes(Path(path)).keys()
        wanted = {
            f"{name}.{key}": Wanted((), (torch.float32, torch.float64)) if key == "step" else as_wide(parameter)
            for name, parameter in self._parameters.items()
            for key in _KEPT[type(self._optimizer)]
        }
        # All of a side or none: a method that trains one side steps no other.
        sides = [side for side in ("A", "B") if any(_side(name) == side for name in names & wanted.keys())]
        expected = {name: want for name, want in wanted.items() if _side(name) in sides}
        tensors = read_tensors(Path(path), expected)
        for name, tensor in tensors.items():
            key = name.rsplit(".", 1)[1]
            if key == "step" and not (1 <= tensor <= rounds and tensor == tensor.round()):
                raise _impossible(name, f"a number of 1 to {rounds:,} steps", f"{tensor.item()}", path)
            if key == "exp_avg_sq" and (tensor < 0).any():
                raise _impossible(name, "squares", "values below zero", path)
        return tensors

    def load(self, path: str | Path, rounds: int) -> None:
        """Take what `read` reads."""
        tensors = self.read(path, rounds)
        self._optimizer.state.clear()
        for full_name, value in tensors.items():
            name, key = full_name.rsplit(".", 1)
            parameter = self._parameters[name]
            # Adam keeps its step count on the CPU whatever the parameter's device.
            self._optimizer.state[parameter][key] = value if key == "step" else value.to(parameter)


def _side(name: str) -> str:
    return name.rsplit(".", 2)[1]


def _impossible(name: str, expected: str, found: str, path: str | Path) -> CheckpointError:
    return CheckpointError(
        f"Expected {expected} in {name} in {path}, found {found}: the file was damaged, resume from another "
        "checkpoint."
    )
