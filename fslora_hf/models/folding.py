"""A base model that a method folds what is learned into, and the file that holds its changed weights."""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from ..storage.tensor_file import exactly, read_tensors
from .adapter import lora_layers

FOLDED_NAME = "folded_base.safetensors"
ROWS = 512  # of a weight of another type than the factors', summed in the wider of the two at a time


class FoldedBase:
    """The weights that an adapter is added to.

    Args:
        weights: module name -> `[out, in]`, the model's own, not copies: they are what `fold` changes.
        scales: module name -> the LoRA scale of the global adapter.
        transposed: modules whose weight is `[in, out]`, as GPT-2's are.
    """

    def __init__(
        self, weights: Mapping[str, torch.Tensor], scales: Mapping[str, float], transposed: Collection[str] = ()
    ):
        self._weights, self._scales, self._transposed = weights, scales, transposed

    @property
    def weights(self) -> Mapping[str, torch.Tensor]:
        """Module name -> the model's own weight."""
        return self._weights

    @property
    def bytes(self) -> int:
        """Of all weights."""
        return sum(weight.numel() * weight.element_size() for weight in self._weights.values())

    @classmethod
    def of(cls, model: PeftModel, adapter_name: str = "default") -> "FoldedBase":
        """The weights of the layers that an adapter of `model` is added to."""
        layers = lora_layers(model, adapter_name)
        return cls(
            {name: layer.get_base_layer().weight for name, layer in layers.items()},
            {name: layer.scaling[adapter_name] for name, layer in layers.items()},
            {name for name, layer in layers.items() if getattr(layer, "fan_in_fan_out", False)},
        )

    @torch.no_grad()
    def fold(self, A: Mapping[str, torch.Tensor], B: Mapping[str, torch.Tensor]) -> float:
        """Add `s * B A` to every weight, `s` the module's LoRA scale, one module at a time.

        Args:
            A: module name -> `[K, in]`, of any rank K.
            B: module name -> `[out, K]`.

        Returns:
            The squared Frobenius norm of what rounding to the weights' own type took away; 0 where this is the type
            of the factors, in which no more is lost than in any sum.
        """
        errors = []
        for name, weight in self._weights.items():
            target = weight.data.mT if name in self._transposed else weight.data
            if target.dtype == A[name].dtype:
                target.addmm_(B[name], A[name], alpha=self._scales[name])
                continue
            wide = torch.promote_types(target.dtype, A[name].dtype)
            for rows, factors in zip(target.split(ROWS), B[name].split(ROWS), strict=True):
                exact = torch.addmm(rows.to(wide), factors.to(wide), A[name].to(wide), alpha=self._scales[name])
                rows.copy_(exact)
                errors.append((exact - rows).square().sum(dtype=torch.float64))
        return torch.stack(errors).sum().item() if errors else 0.0

    def save(self, path: str | Path) -> None:
        """Write the weights under the names they have in the base model, whatever adapters are in it."""
        tensors = {f"{name}.weight": weight.detach().contiguous() for name, weight in self._weights.items()}
        save_file(tensors, path, metadata={"format": "pt"})

    def read(self, path: str | Path) -> dict[str, torch.Tensor]:
        """What `save` wrote, for the same model; changes nothing.

        Raises:
            CheckpointError: it holds anything else.
        """
        return read_tensors(Path(path), {f"{name}.weight": exactly(weight) for name, weight in self._weights.items()})

    @torch.no_grad()
    def load(self, path: str | Path) -> None:
        """Take what `read` reads."""
        saved = self.read(path)
        for name, weight in self._weights.items():
            weight.data.copy_(saved[f"{name}.weight"])


def load_folded_base(model: nn.Module, folder: str | Path) -> bool:
    """Give a base model the weights that a run of `method: flora` left in `folder`; False if there are none.

    Args:
        model: the base that the run began with, unquantized and without adapters; its weights are overwritten.
        folder: a checkpoint, or a finished run's folder.

    Raises:
        ValueError: the file's weights do not fit the model.
    """
    path = Path(folder) / FOLDED_NAME
    if not path.is_file():
        return False
    saved, parameters = _read(path), dict(model.named_parameters())
    for name, weight in saved.items():
        own = parameters.get(name)
        if own is None or own.shape != weight.shape or not own.is_floating_point():
            found = "none" if own is None else f"{tuple(own.shape)} of {own.dtype}"
            raise ValueError(
                f"Expected a base model with {name} of shape {tuple(weight.shape)}, as {path} has it, found {found}: "
                "load the base that the run was trained on, unquantized."
            )
    with torch.no_grad():
        for name, weight in saved.items():
            parameters[name].copy_(weight)
    return True


@contextmanager
def folded_base(model: nn.Module, folder: str | Path) -> Iterator[None]:
    """The base with the weights that `load_folded_base` finds in `folder`, if any, and its own again afterwards."""
    path = Path(folder) / FOLDED_NAME
    names = _read(path).keys() if path.is_file() else ()
    own = {name: p.detach().clone() for name, p in model.named_parameters() if name in names}
    try:
        load_folded_base(model, folder)
        yield
    finally:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name in own:
                    parameter.copy_(own[name])


def _read(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"Expected weights in {path}, found damage ({error}): take another checkpoint.") from error
