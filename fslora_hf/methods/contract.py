"""What a method must return, checked where it returns it: an error then names the method, the client and the module.

Shapes, types and storage are compared without looking at values. Whether these are finite is asked once a client and
once a round; what clients send back is looked at by `CheckFinite` of the updates.
"""

import math
import numbers
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch

from .base import ClientAdapter, FlatTensors, Method, ServerPair, SketchedClient


class MethodError(ValueError):
    """A name that stands for no method, or a method that returns what it must not."""


def path_of(method: Method) -> str:
    """`module:Class` of a method."""
    return f"{type(method).__module__}:{type(method).__qualname__}"


def check_received(method: Method, state: ServerPair, client: SketchedClient, adapter: Any) -> ClientAdapter:
    """What `receive` gave to `client`, if it is an adapter of the client's rank whose tensors are its own.

    Raises:
        MethodError: says what was expected, what was found and how to mend it.
    """
    giver = f"{path_of(method)}.receive to give client {client.client_id}"
    if not isinstance(adapter, ClientAdapter):
        raise _error(f"{giver} a ClientAdapter", _kind(adapter), "return ClientAdapter(A, B, scale)")
    if not _is_finite_number(adapter.scale):
        raise _error(
            f"{giver} a finite number as scale", _number(adapter.scale), "1.0 is the global adapter's own scale"
        )
    storages = {tensor.untyped_storage().data_ptr() for side in (state.A, state.B) for tensor in side.values()}
    for side, tensors, server_side in (("A", adapter.A, state.A), ("B", adapter.B, state.B)):
        _check_side(giver, side, tensors, server_side, client.rank, "the client's rank")
        for module, tensor in tensors.items():
            if tensor.untyped_storage().data_ptr() in storages:
                expected = f"{giver} {side} of {module} as a tensor of its own"
                raise _error(expected, "a view of the server's", "return a copy, such as tensor.clone()")
    _check_values(giver, state, adapter.A, adapter.B)
    return replace(adapter, scale=float(adapter.scale))  # numpy's numbers do not fit into JSON


def check_accumulator(method: Method, accumulator: Any) -> FlatTensors:
    """What `accumulator` returned, if several processes can sum it."""
    if not isinstance(accumulator, FlatTensors):
        expected = f"{path_of(method)}.accumulator to return FlatTensors"
        raise _error(expected, _kind(accumulator), "return zeros_like_pair(state, shapes)")
    return accumulator


def check_weight(method: Method, client: SketchedClient, weight: Any) -> float:
    """What `weigh` returned for a client's update, if it can be a part in an average."""
    if not _is_finite_number(weight) or weight < 0:
        expected = f"{path_of(method)}.weigh to give client {client.client_id} a finite number of at least 0"
        raise _error(expected, _number(weight), "return a float, such as update.weight")
    return float(weight)


def check_change(method: Method, state: ServerPair, change: Any) -> Any:
    """What `finish` returned, if it is a change of every module on the sides that are trained, or None.

    Raises:
        MethodError: says what was expected, what was found and how to mend it.
    """
    if change is None:
        return None
    giver = f"{path_of(method)}.finish to give"
    pair = isinstance(change, (tuple, list)) and len(change) == 2
    if not pair or not all(isinstance(side, Mapping) for side in change):
        raise _error(f"{giver} the changes of A and of B, or None", _kind(change), "return two dicts, A and B")
    rank, rank_name = _rank_of_product(change[0]) if method.folds else (state.rank, "the global rank")
    for side, changes, server_side in (("A", change[0], state.A), ("B", change[1], state.B)):
        if side in method.trains:
            _check_side(giver, side, changes, server_side, rank, rank_name)
        elif changes:
            expected = f"{giver} no change of {side}, since trains={tuple(method.trains)}"
            raise _error(expected, f"one of {next(iter(changes))}", f"return {{}} for {side}")
    _check_values(giver, state, *change)
    return change


def _rank_of_product(A: Mapping[str, Any]) -> tuple[int, str]:
    """The rank that a product to fold has in all modules: that of the first."""
    module, first = next(iter(A.items()), ("the first module", None))
    rank = first.shape[0] if isinstance(first, torch.Tensor) and first.dim() == 2 else 0
    return rank, f"that of A of {module}"


def _check_side(
    giver: str, side: str, tensors: Any, server: Mapping[str, torch.Tensor], rank: int, rank_name: str
) -> None:
    """That one side has a tensor for each of the server's modules, of its type, on its device, of this rank."""
    if not isinstance(tensors, Mapping):
        raise _error(f"{giver} {side} as a dict by module", _kind(tensors), f"fill it as state.{side} is")
    for module in tensors.keys() - server.keys():
        raise _error(f"{giver} {side} of the adapter's modules", repr(module), f"take the names of state.{side}")
    for module, like in server.items():
        what = f"{giver} {side} of {module}"
        if module not in tensors:
            raise _error(what, "none", f"return {side} for every module of state.{side}")
        tensor = tensors[module]
        if not isinstance(tensor, torch.Tensor):
            raise _error(f"{what} as a tensor", _kind(tensor), "return a torch tensor")
        shape = [rank, like.shape[1]] if side == "A" else [like.shape[0], rank]
        if list(tensor.shape) != shape:
            axes = "[rank, in]" if side == "A" else "[out, rank]"
            expected = f"{what} of shape {axes} = {shape}"
            raise _error(expected, list(tensor.shape), f"the rank here is {rank_name}, {rank}")
        if tensor.dtype != like.dtype:
            raise _error(f"{what} in {like.dtype}", tensor.dtype, f"keep the type of state.{side}")
        if tensor.device != like.device:
            raise _error(f"{what} on {like.device}", tensor.device, f"keep the device of state.{side}")


def _check_values(giver: str, state: ServerPair, A: Mapping[str, torch.Tensor], B: Mapping[str, torch.Tensor]) -> None:
    """That all values are finite, unless the server's own are not."""
    if _all_finite([*A.values(), *B.values()]) or not _all_finite([*state.A.values(), *state.B.values()]):
        return
    side, module = next(
        (side, m) for side, tensors in (("A", A), ("B", B)) for m, t in tensors.items() if not _all_finite([t])
    )
    remedy = "look for a division by zero or an overflow, or lower the learning rate"
    raise _error(f"{giver} finite values in {side} of {module}", "NaN or infinity", remedy)


def _all_finite(tensors: Iterable[torch.Tensor]) -> bool:
    """Sums first, one pass and one wait for a GPU: a sum with NaN or infinity in it is not finite, another may be."""
    tensors = list(tensors)
    sums = [tensor.sum() for tensor in tensors]
    if not sums or torch.isfinite(torch.stack(sums)).all():
        return True
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors)  # finite values may overflow in a sum


def _is_finite_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)


def _number(value: Any) -> str:
    return str(value) if isinstance(value, numbers.Real) else _kind(value)


def _kind(value: Any) -> str:
    return "None" if value is None else f"a {type(value).__name__}"


def _error(expected: str, found: Any, remedy: str) -> MethodError:
    return MethodError(f"Expected {expected}, found {found}: {remedy}.")
