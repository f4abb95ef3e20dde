"""One round but for its local steps: clients into the model, their updates out of it, and the server's step."""

import math
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from ..methods import ClientAdapter, ClientUpdate, FlatTensors, Method, PairChange
from ..methods.contract import check_accumulator, check_change, check_received, check_weight
from ..updates.part import RefusedUpdate
from ..updates.pipeline import Pipeline
from .layout import Layout
from .plan import ClientPlan, RoundPlan
from .server import ServerState

if TYPE_CHECKING:
    from ..models.stack import ClientStack


class RoundEngine:
    """Takes the clients of a round through the stack, block by block, and folds what comes back.

    Args:
        plan: round -> its plan.
        layout: which clients this process trains when.
        method, server, stack: what clients receive and how updates fold; the global adapter; the model's slots.
        updates: what happens to updates on their way.
        sum_over_processes: sums a tensor over all processes in place.
        gather: a list of this process's objects -> the list of all processes' objects.
    """

    def __init__(
        self,
        *,
        plan: Callable[[int], RoundPlan],
        layout: Layout,
        method: Method,
        server: ServerState,
        stack: "ClientStack",
        updates: Pipeline | None = None,
        sum_over_processes: Callable[[torch.Tensor], Any] = lambda tensor: None,
        gather: Callable[[list], list] = lambda objects: objects,
    ):
        self.plan, self.layout, self.method, self.server, self.stack = plan, layout, method, server, stack
        self.updates = updates or Pipeline()
        self._sum, self._gather = sum_over_processes, gather
        self._accumulator: FlatTensors | None = None
        self._outcomes: list[tuple[int, float, float, float, str | None]] = []
        self._block: tuple[ClientPlan, ...] = ()
        self._positions: dict[int, int] = {}
        self._losses = torch.zeros(0)
        self._wave = 0
        self.round = 0

    def begin_round(self, round: int) -> RoundPlan:
        """Start a round with an empty accumulator."""
        self.round, self._started = round, time.monotonic()
        plan = self.plan(round)
        self._accumulator = check_accumulator(self.method, self.method.accumulator(self.server, plan.clients))
        self._positions = {client.client_id: position for position, client in enumerate(plan.clients)}
        self._outcomes = []
        return plan

    def hand_over(self, wave: int) -> tuple[ClientPlan, ...]:
        """Load the next block of clients, each with a fresh sketch of the global adapter; returns the block."""
        self._wave, self._block = wave, self.layout.block(self.plan(self.round), wave)
        self.stack.load([self._receive(client) for client in self._block])
        self._losses = torch.zeros(len(self._block), dtype=torch.float64)
        return self._block

    def _receive(self, client: ClientPlan) -> ClientAdapter:
        adapter = self.method.receive(self.server, client, client.sketch)
        return check_received(self.method, self.server, client, adapter)

    def record_loss(self, losses: torch.Tensor) -> None:
        """Add each client's share of its step loss, `[clients]`; a step's micro-batches add up to its token mean."""
        self._losses = self._losses.to(losses.device) + losses.detach().double()

    @property
    def loss_share(self) -> float:
        """Factor that turns this process's summed loss into its part of the mean over all clients of the wave, given
        that the trainer averages over processes."""
        return self.layout.processes / self.layout.clients_in_wave(self._wave)

    def collect(self) -> None:
        """Take the block's updates out of the model, fold the accepted ones, and leave the global adapter active."""
        losses = (self._losses / self.layout.local_steps).tolist()
        for slot, (client, loss) in enumerate(zip(self._block, losses, strict=True)):
            update = self._update(client, *self.stack.change(slot), self.stack.received(slot))
            self._fold(client, loss, self.updates.send(self.round, client, update))
        self.abandon()

    def _fold(self, client: ClientPlan, loss: float, update: ClientUpdate) -> None:
        """Add a client's update to the accumulator, or note why it is refused; and the norm of what came of it."""
        weight, reason = 0.0, None
        try:
            update = self.updates.take(self.round, client, update)
            self.method.accumulate(self._accumulator, update)
            weight = check_weight(self.method, client, self.method.weigh(update))
        except RefusedUpdate as refusal:
            reason = str(refusal)
        self._outcomes.append((client.client_id, loss, update.norm().item(), weight, reason))

    def _update(
        self, client: ClientPlan, A: dict[str, torch.Tensor], B: dict[str, torch.Tensor], received: ClientAdapter
    ) -> ClientUpdate:
        return ClientUpdate(A, B, client.weight, client.sketch, received, self._positions[client.client_id])

    def abandon(self) -> None:
        """Leave the block without folding it, the global adapter active."""
        self._block = ()
        self.stack.unload()

    def close_round(self) -> dict[str, Any]:
        """Sum the folds of all processes, take the server's step, and return the round's ledger record."""
        self._sum(self._accumulator.flat)  # every process has collected its clients by now
        refused = {number for number, *_, reason in self._outcomes if reason is not None}
        self.updates.settle(self.round, self._accumulator, refused)
        outcomes = {outcome[0]: outcome[1:] for outcome in self._gather(self._outcomes)}
        change, self._accumulator = self.method.finish(self.server, self._accumulator), None
        self._step(check_change(self.method, self.server, change))
        clients = self.plan(self.round).clients
        losses, norms, parts, reasons = zip(*(outcomes[client.client_id] for client in clients), strict=True)
        accepted = math.fsum(parts)
        moved = [self._bytes_moved(client) for client in clients]
        refusals = [(client.client_id, reason) for client, reason in zip(clients, reasons, strict=True) if reason]
        return {
            "round": self.round,
            "learning_rate": self.plan(self.round).learning_rate,
            "clients": [client.client_id for client in clients],
            "ranks": [client.rank for client in clients],
            "weights": [part / accepted if part else 0.0 for part in parts],
            "losses": [_finite(loss) for loss in losses],
            "update_norms": [_finite(norm) for norm in norms],
            "refused": [{"client_id": client_id, "reason": reason} for client_id, reason in refusals],
            "bytes_down": sum(down for down, _ in moved),
            "bytes_up": sum(up for _, up in moved),
            "bytes_full_rank": 2 * len(clients) * self.server.rank * self.server.bytes_per_rank,
            **self.method.notes(),
            **self.server.notes(),
            **self.updates.notes(),
            "seconds": round(time.monotonic() - self._started, 3),
        }

    def _step(self, change: PairChange | None) -> None:
        self.server.step(change)

    def _bytes_moved(self, client: ClientPlan) -> tuple[int, int]:
        down, up = self.method.bytes_moved(self.server, client)
        size = next(iter(self.server.A.values())).element_size()
        return down, self.updates.bytes_up(up, size)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
