"""How large an update may be: a multiple of what the updates of this round and of the last ones are in the median.

A bound that has to be known before a run is either far too large to help or refuses what is honest. Norms of honest
clients are alike, so their median is what an honest norm can be held against, and a few clients cannot move it: it is
the lower one, so that even of two clients the larger is held against the smaller. All norms are measured here, and
those of refused updates count, so that a federation whose norms really grow goes on after some rounds.
"""

import contextlib
import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from ..methods import ClientUpdate, SketchedClient
from .bounds import refuse_beyond
from .part import UpdatePart

PAST_ROUNDS = 16  # whose norms are remembered, and read from the ledger of a run that is resumed


class NormBound(UpdatePart):
    """Refuses an update whose Frobenius norm is too far above what norms are.

    All updates of a round are to be measured before the first of them is taken.

    Norms of other rounds and ranks are made comparable first. A client's steps are as large as its learning rate, so a
    norm of another round counts times the quotient of the rates. Of k times the numbers it is the root of k times as
    large with Adam, and that much smaller with some scales and SGD: a norm of another rank counts times the root of
    the quotient of the ranks, the larger over the smaller. What clients have left out of their updates waits to be
    sent and does not shrink when the rate falls: then, no norm of the past counts less than it was.

    Args:
        ratio: how many times the median a norm may be, above 0.
        local_steps: that a client takes in a round.
        keeps_rest: whether clients send later what they leave out now (`error_feedback`).
    """

    def __init__(self, ratio: float, local_steps: int, keeps_rest: bool = False):
        self._ratio, self._local_steps, self._least = ratio, local_steps, 1.0 if keeps_rest else 0.0
        self._past: deque[tuple[float, np.ndarray, np.ndarray]] = deque(maxlen=PAST_ROUNDS)
        self._record: dict[str, Any] = {}  # of the round: what the ledger's says of norms
        self._bounds: dict[int, float] = {}  # of this round's updates, by client id

    def measure(self, clients: Sequence[SketchedClient], updates: Mapping[int, ClientUpdate], rate: float) -> None:
        """See how large the updates of a round may be.

        Args:
            clients: of the round.
            updates: client id -> its update, of all that sent one.
            rate: the round's learning rate.
        """
        norms = {number: update.norm().item() for number, update in updates.items()}
        numbers = {number: sum(t.numel() for side in (update.A, update.B) for t in side.values())
                   for number, update in updates.items()}  # fmt: skip
        self._bounds = self.bounds(clients, norms, rate, numbers)
        sent = [norms.get(client.client_id, math.nan) for client in clients]
        self._record = {"update_norms": [norm if math.isfinite(norm) else None for norm in sent],
                        "ranks": [client.rank for client in clients], "learning_rate": rate,
                        "clients": [client.client_id for client in clients]}  # fmt: skip

    def take(self, round, client, update):
        of = f"{self._ratio:g} times the median of this and the last rounds (max-norm-ratio)"
        refuse_beyond(self._bounds[client.client_id], update, of)
        return update

    def settle(self, round, total, refused):
        self.note(self._record)

    def notes(self):
        """The bound of each client's update, None for one that sent none."""
        bounds = (self._bounds.get(client, math.nan) for client in self._record["clients"])
        return {"norm_bounds": [bound if math.isfinite(bound) else None for bound in bounds]}

    def restore(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Remember the rounds of a ledger, the last of them the last one."""
        self._past.clear()
        for record in records:
            with contextlib.suppress(KeyError, TypeError, ValueError):  # of another version: one that says less
                self.note(record)

    def note(self, record: Mapping[str, Any]) -> None:
        """Remember the norms of a round by its ledger record. A round without a learning rate says nothing."""
        measured = [(norm, rank) for norm, rank in zip(record["update_norms"], record["ranks"], strict=True) if norm]
        if measured and record["learning_rate"] > 0:
            norms, ranks = np.array(measured, dtype=np.float64).T
            self._past.append((record["learning_rate"], norms, ranks))

    def bounds(
        self, clients: Sequence[SketchedClient], norms: Mapping[int, float], rate: float, numbers: Mapping[int, int]
    ) -> dict[int, float]:
        """The largest norm that each client's update may have, by client id, for all that sent one.

        Args:
            clients: of the round.
            norms: client id -> the norm of its update, NaN or infinity where it is not finite.
            rate: the round's learning rate.
            numbers: client id -> how many numbers its update has.
        """
        sent = [client for client in clients if client.client_id in norms]
        # Without a rate nothing moves; with one, who has not moved tells nothing of those who have.
        told = [(norms[c.client_id], c.rank) for c in sent
                if math.isfinite(norms[c.client_id]) and (norms[c.client_id] > 0 or rate == 0)]  # fmt: skip
        pool, ranks = np.array(told, dtype=np.float64).reshape(-1, 2).T
        pool = np.concatenate([pool, *(past * max(rate / then, self._least) for then, past, _ in self._past)])
        ranks = np.concatenate([ranks, *(ranks for _, _, ranks in self._past)])
        farthest = rate * self._local_steps  # that Adam moves a number
        return {client.client_id: self._ratio * _typical(pool, ranks, client.rank, farthest, numbers[client.client_id])
                for client in sent}  # fmt: skip


def _typical(pool: np.ndarray, ranks: np.ndarray, rank: int, farthest: float, numbers: int) -> float:
    """The lower median of what norms of these ranks are at another rank."""
    comparable = pool * np.sqrt(np.maximum(ranks / rank, rank / ranks))
    if len(comparable) < 2:  # a run's very first update has nothing else to be held against
        comparable = np.append(comparable, farthest * math.sqrt(numbers))
    return float(np.sort(comparable)[(len(comparable) - 1) // 2])
