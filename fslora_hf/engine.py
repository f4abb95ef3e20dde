"""One round but for its local steps: clients into the model, their updates out of it, and the server's step."""

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .adapter import ClientStack
from .layout import Layout
from .methods import ClientUpdate, Method
from .plan import ClientPlan, RoundPlan
from .server import ServerState
from .updates import RefusedUpdate

Transform = Callable[[ClientUpdate], ClientUpdate]


class RoundEngine:
    """Takes the clients of a round through the stack, block by block, and folds what comes back.

    Args:
        plan: round -> its plan.
        layout: which clients this process trains when.
        method, server, stack: what clients receive and how updates fold; the global adapter; the model's slots.
        transforms: applied in order to every update; any may refuse it.
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
        stack: ClientStack,
        transforms: Sequence[Transform] = (),
        sum_over_processes: Callable[[torch.Tensor], Any] = lambda tensor: None,
        gather: Callable[[list], list] = lambda objects: objects,
    ):
        self.plan, self.layout, self.method, self.server, self.stack = plan, layout, method, server, stack
        self._transforms, self._sum, self._gather = transforms, sum_over_processes, gather
        self._accumulator = method.accumulator(server)
        self._outcomes: list[tuple[int, float, float, str | None]] = []
        self._block: tuple[ClientPlan, ...] = ()
        self._losses = torch.zeros(0)
        self._wave = 0
        self.round = 0

    def begin_round(self, round: int) -> RoundPlan:
        """Start a round with an empty accumulator."""
        self.round, self._started = round, time.monotonic()
        self._accumulator.flat.zero_()
        self._outcomes = []
        return self.plan(round)

    def hand_over(self, wave: int) -> tuple[ClientPlan, ...]:
        """Load the next block of clients, each with a fresh sketch of the global adapter; returns the block."""
        self._wave, self._block = wave, self.layout.block(self.plan(self.round), wave)
        self.stack.load([self.method.receive(self.server, client, client.sketch) for client in self._block])
        self._losses = torch.zeros(len(self._block), dtype=torch.float64)
        return self._block

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
            update = ClientUpdate(*self.stack.change(slot), client.weight, client.sketch)
            norm, reason = update.norm().item(), None
            try:
                for transform in self._transforms:
                    update = transform(update)
                self.method.accumulate(self._accumulator, update)
            except RefusedUpdate as refusal:
                reason = str(refusal)
            self._outcomes.append((client.client_id, loss, norm, reason))
        self.abandon()

    def abandon(self) -> None:
        """Leave the block without folding it, the global adapter active."""
        self._block = ()
        self.stack.unload()

    def close_round(self) -> dict[str, Any]:
        """Sum the folds of all processes, take the server's step, and return the round's ledger record."""
        self._sum(self._accumulator.flat)
        outcomes = {outcome[0]: outcome[1:] for outcome in self._gather(self._outcomes)}
        self.server.step(self.method.finish(self.server, self._accumulator))
        plan = self.plan(self.round)
        accepted = math.fsum(c.weight for c in plan.clients if outcomes[c.client_id][2] is None)
        size = self.server.bytes_per_rank
        moved = sum(client.rank for client in plan.clients) * size
        refused = {c.client_id: outcomes[c.client_id][2] for c in plan.clients if outcomes[c.client_id][2]}
        return {
            "round": self.round,
            "learning_rate": plan.learning_rate,
            "clients": [client.client_id for client in plan.clients],
            "ranks": [client.rank for client in plan.clients],
            "weights": [0.0 if c.client_id in refused else c.weight / accepted for c in plan.clients],
            "losses": [_finite(outcomes[client.client_id][0]) for client in plan.clients],
            "update_norms": [_finite(outcomes[client.client_id][1]) for client in plan.clients],
            "refused": [{"client_id": client_id, "reason": reason} for client_id, reason in refused.items()],
            "bytes_down": moved,
            "bytes_up": moved,
            "bytes_full_rank": 2 * len(plan.clients) * self.server.rank * size,
            "seconds": round(time.monotonic() - self._started, 3),
        }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
