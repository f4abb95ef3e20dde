"""Transforms of a client's update on its way to the server. A transform returns the update or refuses it."""

import torch

from .methods import ClientUpdate


class RefusedUpdate(Exception):
    """An update the server will not fold; its text is the reason in the round ledger."""


def check_finite(update: ClientUpdate) -> ClientUpdate:
    """Refuse an update that holds NaN or infinity: one of them would spread to the whole global adapter."""
    if not torch.isfinite(update.norm()):
        raise RefusedUpdate("the update is not finite")
    return update
