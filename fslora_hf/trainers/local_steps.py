"""The micro-batches that a process trains its clients on, and what holds within them alone."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..common.draws import seed_from
from ..models.stack import ClientStack


class LocalSteps:
    """Counts the micro-batches of a round. Within each, and only there, the model computes with the clients.

    What is random in a micro-batch (dropout) is drawn anew from the round's path and the micro-batch's number, so that
    it is what it would be had nothing been drawn beside: by a callback that generates, say.
    """

    def __init__(self):
        self._path: tuple[int | str, ...] = ()
        self._taken = 0

    def begin_round(self, *path: int | str) -> None:
        """Start counting; `path` is of the round, and of the process or client that trains."""
        self._path, self._taken = path, 0

    @contextmanager
    def take(self, stack: ClientStack, positions: int) -> Iterator[None]:
        """The forward and backward pass of the next micro-batch, of so many tokens, padding included."""
        torch.manual_seed(seed_from(*self._path, self._taken))
        self._taken += 1
        with stack.at_work(positions):
            yield
