"""Updates as they come over the wire, held against what a client was asked for."""

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..common.foreign_text import LONGEST_NAME, foreign_names, foreign_value
from ..methods import ClientAdapter
from ..rounds.plan import ClientPlan
from ..updates.part import RefusedUpdate
from .packet import Packet, reason_in
from .sparse import unpack
from .tensors import to_tensor


@dataclass(frozen=True)
class Reply:
    """What a client came to: its mean loss, by its own word, and the change of A `[k, in]` and B `[out, k]` of the
    sides it trains, by module."""

    loss: float
    A: dict[str, torch.Tensor]
    B: dict[str, torch.Tensor]


@dataclass(frozen=True)
class Reader:
    """Reads the updates of a run.

    Attributes:
        trains: the sides that clients train and send.
        share: of the numbers of a change that is sent; None for all of it.
    """

    trains: tuple[str, ...]
    share: float | None = None

    def read(self, answer: Packet | str, round: int, client: ClientPlan, held: ClientAdapter) -> Reply:
        """The update in an answer, if it is what this client was asked for in this round.

        Raises:
            RefusedUpdate: it is not; says why.
        """
        if isinstance(answer, str) or answer.kind != "update":
            raise RefusedUpdate(reason_in(answer))
        header = answer.header
        found = header.get("round"), header.get("client_id")
        if found != (round, client.client_id):
            of_round, of_client = (foreign_value(value, LONGEST_NAME) for value in found)
            raise RefusedUpdate(f"the update is of round {of_round}, client {of_client}")
        wanted = {f"{side}.{module}": tensor for side in self.trains for module, tensor in getattr(held, side).items()}
        tensors = answer.tensors
        if self.share is not None:
            dtype = _numpy_type(next(iter(wanted.values())))
            tensors = unpack(tensors, {name: tuple(like.shape) for name, like in wanted.items()}, dtype, self.share)
        sides: dict[str, dict[str, torch.Tensor]] = {"A": {}, "B": {}}
        for name, like in wanted.items():
            side, module = name.split(".", 1)
            sides[side][module] = _tensor(tensors, name, like)
        surplus = tensors.keys() - wanted.keys()
        if surplus:
            raise RefusedUpdate(f"the update holds {foreign_names(surplus)}, which was not asked for")
        return Reply(_number(header, "loss"), **sides)


def _number(header: Mapping[str, Any], name: str) -> float:
    value = header.get(name)
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not abs(value) < sys.float_info.max:
        return math.nan
    return float(value)


def _numpy_type(tensor: torch.Tensor) -> np.dtype:
    return np.dtype(str(tensor.dtype).removeprefix("torch."))


def _tensor(tensors: Mapping[str, np.ndarray], name: str, like: torch.Tensor) -> torch.Tensor:
    array, expected = tensors.get(name), _numpy_type(like)
    if array is None:
        raise RefusedUpdate(f"the update lacks {name}")
    if array.shape != tuple(like.shape):
        found_shape = foreign_value(array.shape, LONGEST_NAME)
        raise RefusedUpdate(f"the update holds {name} of shape {found_shape}, not {tuple(like.shape)}")
    if array.dtype != expected:
        raise RefusedUpdate(f"the update holds {name} as {array.dtype}, not {expected}")
    return to_tensor(array, like)
