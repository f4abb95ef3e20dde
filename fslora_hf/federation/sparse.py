"""Top-k updates on the wire: the numbers that are sent and their places, in the bytes that the ledger counts."""

import math
from collections.abc import Mapping

import numpy as np

from ..common.foreign_text import LONGEST_NAME, foreign_names, foreign_value
from ..updates.part import RefusedUpdate
from ..updates.top_k import kept_numbers, list_bytes, mask_bytes

VALUES, PLACES, MASK = "values", "places", "mask"  # names of a sparse update's arrays


def pack(tensors: Mapping[str, np.ndarray], share: float) -> dict[str, np.ndarray]:
    """Arrays that stand for tensors of which at most a share of all numbers is not zero.

    The numbers, by ascending place in all tensors one after the other, by name, and their places: each by itself or
    one bit for every place there is, whichever is less; or the tensors as they are, where that is least.
    """
    flat = np.concatenate([tensors[name].reshape(-1) for name in sorted(tensors)])
    kept = kept_numbers(flat.size, share)
    form = _form(flat.size, kept, flat.itemsize)
    if form is None:
        return dict(tensors)
    places = np.flatnonzero(flat)
    if len(places) < kept:  # zeros among the largest: any will do
        places = np.sort(np.concatenate([places, np.flatnonzero(flat == 0)[: kept - len(places)]]))
    if form == PLACES:
        return {VALUES: flat[places], PLACES: places.astype(_place_type(flat.size))}
    mask = np.zeros(flat.size, dtype=bool)
    mask[places] = True
    return {VALUES: flat[places], MASK: np.packbits(mask)}


def unpack(
    arrays: Mapping[str, np.ndarray], shapes: Mapping[str, tuple[int, ...]], dtype: np.dtype, share: float
) -> dict[str, np.ndarray]:
    """The tensors of these shapes and type that `pack` was given, zeros where nothing was sent.

    Raises:
        RefusedUpdate: the arrays are not what `pack` returns for such tensors.
    """
    size = sum(math.prod(shape) for shape in shapes.values())
    kept = kept_numbers(size, share)
    form = _form(size, kept, dtype.itemsize)
    if form is None:
        return dict(arrays)
    where = np.dtype(np.uint8) if form == MASK else _place_type(size)
    length = mask_bytes(size) if form == MASK else kept
    for name, wanted_type, wanted_length in ((VALUES, dtype, kept), (form, where, length)):
        array = arrays.get(name)
        if array is None or array.dtype != wanted_type or array.shape != (wanted_length,):
            found = (
                "nothing" if array is None else f"{array.dtype} of shape {foreign_value(array.shape, LONGEST_NAME)}"
            )
            raise RefusedUpdate(f"the update holds {found} as its {name}, not {wanted_length} of {wanted_type}")
    if arrays.keys() != {VALUES, form}:
        surplus = foreign_names(arrays.keys() - {VALUES, form})
        raise RefusedUpdate(f"the update holds {surplus}, which was not asked for")
    flat = np.zeros(size, dtype=dtype)
    flat[_places(arrays[form], form, size, kept)] = arrays[VALUES]
    tensors, start = {}, 0
    for name in sorted(shapes):
        end = start + math.prod(shapes[name])
        tensors[name], start = flat[start:end].reshape(shapes[name]), end
    return tensors


def _places(given: np.ndarray, form: str, size: int, kept: int) -> np.ndarray:
    """Places, checked to be `kept` different ones below `size`."""
    if form == MASK:
        places = np.flatnonzero(np.unpackbits(given))
    else:
        places = given.astype(np.int64)
        if (np.diff(places) <= 0).any():
            raise RefusedUpdate("the update holds places that do not ascend")
    if len(places) != kept or (kept and places[-1] >= size):
        raise RefusedUpdate(f"the update holds other than {kept} places below {size}")
    return places


def _form(numbers: int, kept: int, itemsize: int) -> str | None:
    """How places are told, None for an update that is sent whole."""
    each, mask = list_bytes(numbers, kept), mask_bytes(numbers)
    if kept * itemsize + min(each, mask) >= numbers * itemsize:
        return None
    return PLACES if each <= mask else MASK


def _place_type(numbers: int) -> np.dtype:
    return np.dtype(np.uint32 if numbers < 2**32 else np.uint64)
