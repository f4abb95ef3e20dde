"""The clients' half of a round: what they receive, how it gets into the model, and what comes out of it."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from ..methods import ClientAdapter, ClientUpdate
from ..updates.pipeline import Pipeline
from .layout import Layout
from .plan import ClientPlan, RoundPlan


class Stack(Protocol):
    """A model's room for the adapters of the clients that train together."""

    def load(self, adapters: Sequence[ClientAdapter]) -> None:
        """Put clients in, for the model to train."""

    def unload(self) -> None:
        """Make the model compute with the global adapter again."""

    def change(self, slot: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """What training changed in the client of `slot`: module name -> A `[k, in]`, and -> B `[out, k]`."""

    def received(self, slot: int) -> ClientAdapter:
        """What the client in `slot` was loaded with."""


@dataclass(frozen=True)
class Returned:
    """What came of a client's part in a round.

    Attributes:
        client: whose it is.
        loss: its mean over the local steps.
        update: as it was sent; None if none came, or none that can be read.
        missing: why none came.
    """

    client: ClientPlan
    loss: float
    update: ClientUpdate | None
    missing: str | None = None


class Clients(Protocol):
    """The clients' half of a run's rounds, wherever they train."""

    def begin(self, plan: RoundPlan) -> None:
        """Start a round."""

    def hand_over(self, wave: int) -> tuple[ClientPlan, ...]:
        """Give the clients of a wave what they train; returns them."""

    def collect(self) -> Iterator[Returned]:
        """What came of each client of the last wave, one after the other; the global adapter is active afterwards."""

    def taken(self, client: ClientPlan, reason: str | None) -> None:
        """Told that a client's update was folded, or why it was refused."""

    def abandon(self) -> None:
        """Leave the wave as it is, the global adapter active."""

    def bytes_moved(self, client: ClientPlan) -> tuple[int, int] | None:
        """Bytes that went down to a client, and up, in this round; None: as its method and its updates' parts say."""


class LocalClients:
    """Clients that this process trains, block by block.

    Args:
        layout: which of them when.
        stack: the model's slots.
        receive: client -> the adapter that it starts the round with.
        updates: what happens to their updates; of it, `send`.
        began, loaded: told when a round has begun, and when a block is in the model.
    """

    def __init__(
        self,
        *,
        layout: Layout,
        stack: Stack,
        receive: Callable[[ClientPlan], ClientAdapter],
        updates: Pipeline | None = None,
        began: Callable[[RoundPlan], Any] = lambda plan: None,
        loaded: Callable[[], Any] = lambda: None,
    ):
        self.layout, self.stack = layout, stack
        self._receive, self._updates, self._began, self._loaded = receive, updates or Pipeline(), began, loaded
        self._plan: RoundPlan | None = None
        self._block: tuple[ClientPlan, ...] = ()
        self._seated: tuple[ClientPlan, ...] = ()
        self._losses = torch.zeros(0)
        self._wave = 0

    @property
    def block(self) -> tuple[ClientPlan, ...]:
        """The clients of this process in the model, by slot; none where it borrows some."""
        return self._block

    @property
    def seated(self) -> tuple[ClientPlan, ...]:
        """The clients in the model, by slot, borrowed or this process's own."""
        return self._seated

    @property
    def borrows(self) -> bool:
        """Whether the clients in the model are another process's, so that what comes of them counts for nothing."""
        return not self._block

    def begin(self, plan):
        self._plan = plan
        self._began(plan)

    def hand_over(self, wave):
        """Load the next block of clients, or a borrowed one; returns the clients that are this process's own."""
        self._wave, self._block = wave, self.layout.block(self._plan, wave)
        self._seated = self.layout.seated(self._plan, wave)
        self.stack.load([self._receive(client) for client in self._seated])
        self._losses = torch.zeros(len(self._seated), dtype=torch.float64)
        self._loaded()
        return self._block

    def record_loss(self, losses: torch.Tensor) -> None:
        """Add each client's share of its step loss, `[clients]`; a step's micro-batches add up to its token mean."""
        self._losses = self._losses.to(losses.device) + losses.detach().double()

    @property
    def loss_share(self) -> float:
        """Factor that turns this process's summed loss into its part of the mean over all clients of the wave, given
        that the trainer averages over processes; 0 for what is borrowed."""
        return 0.0 if self.borrows else self.layout.processes / self.layout.clients_in_wave(self._wave)

    def collect(self):
        """The block's updates, taken out of the model one at a time."""
        losses = (self._losses / self.layout.local_steps).tolist()
        positions = positions_of(self._plan)
        for slot, client in enumerate(self._block):
            received = self.stack.received(slot)
            update = update_of(client, *self.stack.change(slot), received, positions[client.client_id])
            yield Returned(client, losses[slot], self._updates.send(self._plan.round, client, update))
        self.abandon()

    def taken(self, client, reason):
        pass

    def abandon(self):
        self._block = self._seated = ()
        self.stack.unload()

    def bytes_moved(self, client):
        return None


def positions_of(plan: RoundPlan) -> dict[int, int]:
    """Client id -> its place in the cohort, from 0."""
    return {client.client_id: position for position, client in enumerate(plan.clients)}


def update_of(
    client: ClientPlan,
    A: dict[str, torch.Tensor],
    B: dict[str, torch.Tensor],
    received: ClientAdapter,
    position: int,
) -> ClientUpdate:
    """The update of a client that changed what it `received` by A `[k, in]` and B `[out, k]`, by module."""
    return ClientUpdate(A, B, client.weight, client.sketch, received, position)
