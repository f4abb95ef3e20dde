"""Updates that the server will not fold: those that are not finite, and those that are too large."""

import torch

from ..methods import ClientUpdate
from .part import RefusedUpdate, UpdatePart

NOT_FINITE = "the update is not finite"  # the reason of a refusal


class CheckFinite(UpdatePart):
    """Refuses an update that holds NaN or infinity: one of them would spread to the whole global adapter."""

    def take(self, round, client, update):
        if not torch.isfinite(update.norm()):
            raise RefusedUpdate(NOT_FINITE)
        return update


class MaxNorm(UpdatePart):
    """Refuses an update whose Frobenius norm over all modules is larger than `norm`."""

    def __init__(self, norm: float):
        self.norm = norm

    def take(self, round, client, update):
        refuse_beyond(self.norm, update)
        return update


def refuse_beyond(norm: float, update: ClientUpdate, source: str = "") -> None:
    """Raises RefusedUpdate if the update's norm is larger than `norm`; `source` says whence that is."""
    found = update.norm().item()
    if found > norm:
        why = f", {source}" if source else ""
        raise RefusedUpdate(f"the norm of the update, {found:.3g}, is beyond the bound of {norm:.6g}{why}")
