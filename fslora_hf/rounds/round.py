"""The server's half of a round: what clients are given, which of their updates are folded, and the server's step."""

import math
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch

from ..methods import ClientAdapter, ClientUpdate, FlatTensors, Method, PairChange
from ..methods.contract import check_accumulator, check_change, check_received, check_weight
from ..updates.part import RefusedUpdate
from ..updates.pipeline import Pipeline
from .plan import ClientPlan, RoundPlan
from .server import ServerState


class Round:
    """Opens rounds, takes updates, and closes them with the server's step; where clients train it does not know.

    Args:
        method, state: what clients receive and how updates fold; the global adapter.
        updates: what happens to updates on their way; of it, `take` and `settle`.
        sum_over_processes: sums a tensor over all processes in place.
        gather: a list of this process's objects -> the list of all processes' objects.
        stepped: told the round and the change that the server's step was taken with, if any.
    """

    def __init__(
        self,
        *,
        method: Method,
        state: ServerState,
        updates: Pipeline | None = None,
        sum_over_processes: Callable[[torch.Tensor], Any] = lambda tensor: None,
        gather: Callable[[list], list] = lambda objects: objects,
        stepped: Callable[[int, PairChange | None], Any] = lambda round, change: None,
    ):
        self.method, self.state, self.updates = method, state, updates or Pipeline()
        self._sum, self._gather, self._stepped = sum_over_processes, gather, stepped
        self._plan: RoundPlan | None = None
        self._accumulator: FlatTensors | None = None
        self._outcomes: list[tuple[int, float, float, float, str | None]] = []

    def open(self, plan: RoundPlan) -> None:
        """Start a round with an empty accumulator."""
        self._plan, self._started = plan, time.monotonic()
        self._accumulator = check_accumulator(self.method, self.method.accumulator(self.state, plan.clients))
        self._outcomes = []

    @torch.no_grad()
    def give(self, client: ClientPlan) -> ClientAdapter:
        """What a client starts the round with: a fresh sketch of the global adapter."""
        return check_received(self.method, self.state, client, self.method.receive(self.state, client, client.sketch))

    @torch.no_grad()
    def take(self, client: ClientPlan, loss: float, update: ClientUpdate) -> str | None:
        """Add a client's update to the accumulator and note the norm of what came of it; returns why it is refused,
        None if it is not."""
        weight, reason = 0.0, None
        try:
            update = self.updates.take(self._plan.round, client, update)
            self.method.accumulate(self._accumulator, update)
            weight = check_weight(self.method, client, self.method.weigh(update))
        except RefusedUpdate as refusal:
            reason = str(refusal)
        self._outcomes.append((client.client_id, loss, update.norm().item(), weight, reason))
        return reason

    def miss(self, client: ClientPlan, reason: str) -> None:
        """Note why no update of a client came."""
        self._outcomes.append((client.client_id, math.nan, math.nan, 0.0, reason))

    @torch.no_grad()
    def close(
        self, bytes_moved: Callable[[ClientPlan], tuple[int, int] | None] = lambda client: None
    ) -> dict[str, Any]:
        """Sum the folds of all processes, take the server's step, and return the round's ledger record.

        Args:
            bytes_moved: bytes that went down to a client, and up; None where the method and the updates' parts say it.
        """
        self._sum(self._accumulator.flat)  # every process has collected its clients by now
        refused = {number for number, *_, reason in self._outcomes if reason is not None}
        self.updates.settle(self._plan.round, self._accumulator, refused)
        outcomes = {outcome[0]: outcome[1:] for outcome in self._gather(self._outcomes)}
        change, self._accumulator = self.method.finish(self.state, self._accumulator), None
        self.state.step(check_change(self.method, self.state, change))
        self._stepped(self._plan.round, change)
        clients = self._plan.clients
        told = [outcomes[client.client_id] for client in clients]
        return self._record(told, [bytes_moved(client) or self._bytes_moved(client) for client in clients])

    def _record(
        self, outcomes: Iterable[tuple[float, float, float, str | None]], moved: list[tuple[int, int]]
    ) -> dict[str, Any]:
        clients = self._plan.clients
        losses, norms, parts, reasons = zip(*outcomes, strict=True)
        accepted = math.fsum(parts)
        refusals = [(client.client_id, reason) for client, reason in zip(clients, reasons, strict=True) if reason]
        record = {
            "round": self._plan.round,
            "learning_rate": self._plan.learning_rate,
            "clients": [client.client_id for client in clients],
            "ranks": [client.rank for client in clients],
            "weights": [part / accepted if part else 0.0 for part in parts],
            "losses": [_finite(loss) for loss in losses],
            "update_norms": [_finite(norm) for norm in norms],
            "refused": [{"client_id": client_id, "reason": reason} for client_id, reason in refusals],
            "bytes_down": sum(down for down, _ in moved),
            "bytes_up": sum(up for _, up in moved),
            "bytes_full_rank": 2 * len(clients) * self.state.rank * self.state.bytes_per_rank,
            **self.method.notes(),
            **self.state.notes(),
            "seconds": round(time.monotonic() - self._started, 3),
        }
        notes = self.updates.notes()
        if taken := sorted(notes.keys() & record.keys()):
            raise ValueError(
                "Expected notes of parts of updates by names that the ledger does not have, found "
                f"{taken[0]}: rename it."
            )
        return record | notes

    def _bytes_moved(self, client: ClientPlan) -> tuple[int, int]:
        down, up = self.method.bytes_moved(self.state, client)
        return down, self.updates.bytes_up(up, next(iter(self.state.A.values())).element_size())


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
