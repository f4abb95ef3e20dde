"""A federated run: which round it is in, what is left of it, and the two halves of the round at work."""

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from .layout import Layout
from .local import Clients
from .plan import ClientPlan, RoundPlan
from .round import Round


class FederatedRun:
    """Counts the rounds of a run and takes them from their clients to the server and back.

    Args:
        plan: round -> its plan; the same for ever.
        layout: how clients are spread over steps.
        num_rounds: after which the run ends.
        upload_budget: megabytes (10**6 bytes) of uploads after which it ends; None: none.

    Attributes:
        rounds_done: rounds that are over.
        bytes_up: that all uploads so far come to; with a budget, those before a call of `train()` too.
        clients: the clients' half of the round at work; None between calls of `train()`.
        round: the server's half; None on a node, whose server is elsewhere.
    """

    clients: Clients | None = None
    round: Round | None = None

    def __init__(
        self,
        plan: Callable[[int], RoundPlan],
        layout: Layout,
        num_rounds: int,
        upload_budget: float | None = None,
    ):
        self.plan, self.layout = plan, layout
        self.num_rounds, self.upload_budget = num_rounds, upload_budget
        self.rounds_done, self.bytes_up = 0, 0
        self._ahead: ThreadPoolExecutor | None = None

    # ---- Where the run is ----

    def locate_step(self, step: int) -> tuple[int, int, int]:
        """Round, wave of clients within it, and local step within that, of a global step counted from 0."""
        round, step = divmod(step, self.layout.steps_per_round)
        return round, *divmod(step, self.layout.local_steps)

    @property
    def steps_done(self) -> int:
        """Global steps of the rounds that are over."""
        return self.rounds_done * self.layout.steps_per_round

    @property
    def is_over(self) -> bool:
        """Whether all rounds are done, or the budget of uploads is used up."""
        spent = self.upload_budget is not None and self.bytes_up >= self.upload_budget * 1e6
        return spent or self.rounds_done == self.num_rounds

    @property
    def rounds_left(self) -> int:
        """Rounds until the run ends: a guess, from the uploads so far, where a budget may end it before the last."""
        left = self.num_rounds - self.rounds_done
        if self.upload_budget is None or self.bytes_up == 0:
            return left
        affordable = math.ceil((self.upload_budget * 1e6 - self.bytes_up) * self.rounds_done / self.bytes_up)
        return max(0, min(left, affordable))

    # ---- A round ----

    @property
    def is_open(self) -> bool:
        """Whether rounds can be run."""
        return self.clients is not None

    def open(self, clients: Clients, round: Round | None) -> None:
        """Begin at round 0, or where `rounds_done` is then set to, with these halves."""
        self.clients, self.round = clients, round
        self.rounds_done, self.bytes_up = 0, 0
        self._ahead = ThreadPoolExecutor(1, thread_name_prefix="plan")

    def close(self) -> None:
        """Let the halves go."""
        self.clients = self.round = None
        if self._ahead is not None:
            self._ahead.shutdown()
            self._ahead = None

    def begin_round(self, round: int) -> None:
        """Start a round, counted from 0, and plan the next one while it trains."""
        plan = self.plan(round)
        if self.round is not None:
            self.round.open(plan)
        self.clients.begin(plan)
        if round + 1 < self.num_rounds:
            self._ahead.submit(self.plan, round + 1)

    def hand_over(self, wave: int) -> tuple[ClientPlan, ...]:
        """Give the next clients what they train; returns those of this process (none: it idles)."""
        return self.clients.hand_over(wave)

    def collect(self) -> None:
        """Take what the clients that were handed over have come to."""
        for returned in self.clients.collect():
            if returned.update is None:
                self.round.miss(returned.client, returned.missing)
            else:
                reason = self.round.take(returned.client, returned.loss, returned.update)
                self.clients.taken(returned.client, reason)

    def aggregate(self) -> dict[str, Any]:
        """Fold the round into the global adapter; returns the round's ledger record."""
        record = self.round.close(self.clients.bytes_moved)
        self.rounds_done = record["round"] + 1
        self.bytes_up += record["bytes_up"]
        return record
