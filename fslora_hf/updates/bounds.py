"""Transforms of a client's update on its way to the server. A transform returns the update or refuses it."""

from collections.abc import Callable

import torch

from ..methods import ClientUpdate

NOT_FINITE = "the update is not finite"  # the reason of a refusal


class RefusedUpdate(Exception):
    """An update the server will not fold; its text is the reason in the round ledger."""


def at_most(norm: float, source: str = "") -> Callable[[ClientUpdate], ClientUpdate]:
    """Refuse an update whose Frobenius norm over all modules is larger than `norm`; `source` says whence that is."""

    def check_norm(update: ClientUpdate) -> ClientUpdate:
        found = update.norm().item()
        if found > norm:
            why = f", {source}" if source else ""
            raise RefusedUpdate(f"the norm of the update, {found:.3g}, is beyond the bound of {norm:.6g}{why}")
        return update

    return check_norm


def check_finite(update: ClientUpdate) -> ClientUpdate:
    """Refuse an update that holds NaN or infinity: one of them would spread to the whole global adapter."""
    if not torch.isfinite(update.norm()):
        raise RefusedUpdate(NOT_FINITE)
    return update
