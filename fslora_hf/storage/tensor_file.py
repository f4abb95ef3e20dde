"""Safetensors files that somebody else may have written: names, shapes, types and finiteness before any use."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from ..common.foreign_text import foreign_names, foreign_text
from .state_file import CheckpointError

_NAMES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64"}
_REMEDY = "the file was damaged or is of another run; restore it or resume from another checkpoint"


class Wanted(NamedTuple):
    """What a tensor must be."""

    shape: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...]


def exactly(tensor: torch.Tensor) -> Wanted:
    """Of the shape and type of `tensor`."""
    return Wanted(tuple(tensor.shape), (tensor.dtype,))


def as_wide(tensor: torch.Tensor) -> Wanted:
    """Of the shape of `tensor` and a type that it holds without rounding, no narrower than float32."""
    narrower = (torch.float32,) if tensor.dtype == torch.float64 else ()
    return Wanted(tuple(tensor.shape), (tensor.dtype, *narrower))


def tensor_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of a file's tensors by their names, as the header claims them.

    Raises:
        CheckpointError: it is damaged.
    """
    return _open(path, lambda file: {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()})


def read_tensors(path: Path, wanted: Mapping[str, Wanted]) -> dict[str, torch.Tensor]:
    """The tensors of a file, which must be these and no others, and finite.

    Raises:
        CheckpointError: they are not, or the file is damaged.
    """
    return _open(path, lambda file: _read(path, file, wanted))


def _open(path: Path, read):
    try:
        with safe_open(path, framework="pt") as file:
            return read(file)
    except CheckpointError:
        raise
    except (SafetensorError, OSError, ValueError, TypeError, KeyError, RuntimeError, MemoryError) as error:
        raise CheckpointError(
            f"Expected tensors in {path}, found damage ({foreign_text(error) or type(error).__name__}): {_REMEDY}."
        ) from error


def _read(path: Path, file, wanted: Mapping[str, Wanted]) -> dict[str, torch.Tensor]:
    names: Collection[str] = set(file.keys())
    if names != wanted.keys():
        missing, unknown = wanted.keys() - names, names - wanted.keys()
        found = [f"{foreign_names(missing)} missing"] if missing else []
        found += [f"{foreign_names(unknown)} that nothing asks for"] if unknown else []
        raise CheckpointError(f"Expected {len(wanted)} tensors in {path}, found {' and '.join(found)}: {_REMEDY}.")
    for name, want in wanted.items():  # from the header, before anything is read
        part = file.get_slice(name)
        shape, kind = tuple(part.get_shape()), part.get_dtype()
        if shape != want.shape or kind not in [_NAMES[dtype] for dtype in want.dtypes]:
            kinds = " or ".join(str(dtype).removeprefix("torch.") for dtype in want.dtypes)
            raise CheckpointError(
                f"Expected {name} of shape {want.shape} in {kinds} in {path}, found {foreign_text(shape, 60)} in "
                f"{foreign_text(kind)}: {_REMEDY}."
            )
    tensors = {name: file.get_tensor(name) for name in wanted}
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise CheckpointError(f"Expected finite numbers in {name} in {path}, found NaN or infinity: {_REMEDY}.")
    return tensors
