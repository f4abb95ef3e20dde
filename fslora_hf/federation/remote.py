"""The clients' half of a federation's rounds, at its server: nodes are asked over the wire, and answer or do not."""

import logging
import math
import time
from collections.abc import Callable, Collection, Hashable, Iterator
from dataclasses import dataclass

from ..common.foreign_text import LONGEST_REASON, foreign_names, foreign_text
from ..methods import ClientAdapter, ClientUpdate, PairChange
from ..rounds.local import Returned, positions_of, update_of
from ..rounds.plan import ClientPlan, RoundPlan
from ..rounds.round import Round
from ..updates.norm_bound import NormBound
from ..updates.part import RefusedUpdate
from .exchange import Exchange, answers
from .folds import Folds
from .packet import Packet
from .reading import Reader, Reply
from .roster import FederationError, Roster
from .tensors import to_numpy

logger = logging.getLogger(__name__)

LONGEST_PAUSE = 8  # rounds that a client is left in peace after it has missed deadlines


@dataclass(frozen=True)
class RoundRules:
    """When a round is over, and what is folded.

    Attributes:
        deadline_seconds: from when the clients are asked on.
        min_clients: updates that a round must have.
        max_update_norm: largest Frobenius norm of an update; None for no bound.
        max_norm_ratio: largest norm as a multiple of the median norm of this round's and the last rounds' updates; 0
            for no such bound.
    """

    deadline_seconds: float
    min_clients: int
    max_update_norm: float | None = None
    max_norm_ratio: float = 0.0


class RemoteClients:
    """Clients that train on nodes. Their updates are told in the simulator's order, whenever they came.

    Args:
        round: the server's half, which says what they receive.
        exchange, roster, rules: how clients are reached, who they are, when a round is over.
        norm_bound: what measures all updates of a round before the first of them is taken.
        share: of the numbers of a change, that nodes send; None for all.
        checkpoints: where nodes keep what they leave out of their updates, the rounds done in each checkpoint that the
            run may go back to.

    Attributes:
        folded: client -> the last round in which its update was folded.
    """

    def __init__(
        self,
        *,
        round: Round,
        exchange: Exchange,
        roster: Roster,
        rules: RoundRules,
        norm_bound: NormBound | None = None,
        share: float | None = None,
        checkpoints: Callable[[], Collection[int]] | None = None,
    ):
        self.exchange, self.roster, self.rules = exchange, roster, rules
        self.method, self.state, self._give = round.method, round.state, round.give
        self.folded: dict[int, int] = {}
        self._checkpoints = checkpoints
        self._reader, self._norm_bound = Reader(self.method.trains, share), norm_bound
        self._folds = None if self.state.base is None else Folds(self.state.base)
        self._bases: dict[int, int] = {}  # node -> how many rounds have been folded into its base
        self._notices: dict[int, str] = {}  # why the last update of a client was left out
        self._misses: dict[int, int] = {}  # deadlines that a client has missed in a row
        self._paused_until: dict[int, int] = {}  # the round from which on it is asked again
        self._moved: dict[int, list[int]] = {}  # client -> bytes that went down, and up

    def begin(self, plan: RoundPlan) -> None:
        self._plan = plan

    @property
    def round(self) -> int:
        """The round at work, from 0."""
        return self._plan.round

    def hand_over(self, wave: int) -> tuple[ClientPlan, ...]:
        """Send every client of the round its part; where they are too few, wait for nodes that come back in time."""
        self._asked: dict[int, Hashable] = {}  # node -> the ticket of its answer
        self._client_of: dict[int, int] = {}
        self.roster.refresh()
        self._missing: dict[int, str] = {}
        self._held: dict[int, ClientAdapter] = {}
        self._begun = time.monotonic()
        clients = self._plan.clients
        self._moved = {client.client_id: [0, 0] for client in clients}
        for client in clients:
            self._ask(client, self.rules.deadline_seconds, self._paused_until.get(client.client_id, 0))
        while len(self._asked) < self.rules.min_clients and self._seconds_left() > 0:
            logger.info("Round %d: %d clients are connected; waiting for more.", self.round, len(self._asked))
            time.sleep(min(self.exchange.poll_seconds, self._seconds_left()))
            self.roster.refresh()
            for client in clients:
                if self.roster.node_of(client.client_id) not in self._asked:
                    self._ask(client, self._seconds_left())
        return clients

    def _seconds_left(self) -> float:
        return max(0.0, self._begun + self.rules.deadline_seconds - time.monotonic())

    def _ask(self, client: ClientPlan, seconds: float, again: int = 0) -> None:
        """Send a client its part, of use for so many seconds, unless that is not to be before the round `again`."""
        number, node = client.client_id, self.roster.node_of(client.client_id)
        if node is None:
            self._missing[number] = "its node is not connected"
        elif self.round < again:
            self._missing[number] = f"it missed its last deadline; it is asked again in round {again}"
        else:
            for left in [left for left, asked in self._client_of.items() if asked == number]:
                del self._asked[left], self._client_of[left]  # it came back as another node
            self._held[number] = self._give(client)
            packet = self._question(client, self._held[number], node)
            self._asked[node] = self.exchange.send(node, packet, max(seconds, 0.01))
            self._client_of[node] = number
            self._moved[number][0] += packet.tensor_bytes
            self._missing.pop(number, None)

    def _question(self, client: ClientPlan, held: ClientAdapter, node: int) -> Packet:
        header = {"kind": "train", "session": self.roster.session, "round": self.round,
                  "client_id": client.client_id, "rank": client.rank, "scale": held.scale,
                  "notice": self._notices.pop(client.client_id, None)}  # fmt: skip
        if self._checkpoints is not None:
            header |= {"run": self.roster.run, "folded": self.folded.get(client.client_id),
                       "checkpoints": sorted(self._checkpoints())}  # fmt: skip
        new = self.roster.is_new(node)
        if self._folds is not None:  # the node draws its part from the seed, and its own base has all that was learned
            dtype = str(next(iter(self.state.base.weights.values())).dtype).removeprefix("torch.")
            have = 0 if new else self._bases[node]
            header |= {"base_from": have, "base_rounds": self.round, "base_dtype": dtype}
            return Packet(header, self._folds.since(have, self.round))
        if self.method.beside_global:  # the node draws its part from the seed, and computes beside the global adapter
            pair = {"A": self.state.A, "B": self.state.B}
        else:
            pair = {side: getattr(held, side) for side in self.method.trains}
            if new:  # the side that is not trained, until it has come
                pair |= {side: getattr(held, side) for side in "AB"}
        return Packet(header, to_numpy(pair))

    def collect(self) -> Iterator[Returned]:
        """Wait until all have answered or the deadline is over, and tell what came.

        Raises:
            FederationError: fewer than `min_clients` updates came and were folded; after the last was told.
        """
        losses, updates = self._read(self._await())
        # The order of the simulator's blocks: equal updates are then folded to equal bits.
        for client in sorted(self._plan.clients, key=lambda client: client.rank):
            number = client.client_id
            if number in updates:
                yield Returned(client, losses[number], updates[number])
            else:
                yield Returned(client, math.nan, None, self._missing[number])
        folded = len(self._plan.clients) - len(self._missing)
        if folded < self.rules.min_clients:
            reasons = foreign_names([f"client {number}: {why}" for number, why in sorted(self._missing.items())],
                                    longest=LONGEST_REASON, between="; ")  # fmt: skip
            raise FederationError(
                f"Expected the updates of at least min-clients={self.rules.min_clients} clients in round {self.round} "
                f"within {self.rules.deadline_seconds:g} s, found {folded} ({reasons}): the rounds before it are "
                "kept; see to the nodes, or raise the deadline, and resume."
            )

    def _read(self, replies: dict[int, Reply]) -> tuple[dict[int, float], dict[int, ClientUpdate]]:
        """Losses and updates by client; how large the updates may be is known as soon as all are there."""
        plan, positions = self._plan, positions_of(self._plan)
        updates = {number: update_of(client, reply.A, reply.B, self._held[number], positions[number])
                   for client in plan.clients if (reply := replies.get(number := client.client_id))}  # fmt: skip
        if self._norm_bound is not None:
            self._norm_bound.measure(plan.clients, updates, plan.learning_rate)
        return {number: reply.loss for number, reply in replies.items()}, updates

    def taken(self, client: ClientPlan, reason: str | None) -> None:
        """Remember whose update was folded; whose was refused is told with its next part."""
        if reason is None:
            self.folded[client.client_id] = self.round
        else:
            self._missing[client.client_id] = self._notices[client.client_id] = reason

    def abandon(self) -> None:
        """Nothing of a round is held here: the global adapter is always active."""

    def stepped(self, round: int, change: PairChange | None) -> None:
        """Keep what a round added to the base, for the nodes that lack it."""
        if self._folds is not None:
            self._folds.note(round, change)
            nodes = {member.node for member in self.roster.present().values()}
            self._bases = {node: rounds for node, rounds in self._bases.items() if node in nodes}
            self._folds.forget(min((self._bases.get(node, 0) for node in nodes), default=0))

    def _await(self) -> dict[int, Reply]:
        """Client -> its update, of all that answer in time with what was asked for."""
        updates: dict[int, Reply] = {}
        plans = {client.client_id: client for client in self._plan.clients}
        for node, answer in answers(self.exchange, self._asked, self._seconds_left()):
            number = self._client_of[node]
            self._misses.pop(number, None)
            if isinstance(answer, Packet) and answer.kind == "update":
                self._moved[number][1] = min(answer.tensor_bytes, self._most_bytes(number))
            try:
                updates[number] = self._reader.read(answer, self.round, plans[number], self._held[number])
                self.roster.is_known(node)
                if self._folds is not None:
                    self._bases[node] = self.round
            except RefusedUpdate as refusal:
                self._missing[number] = self._notices[number] = foreign_text(refusal, LONGEST_REASON)
            if isinstance(answer, Packet) and answer.header.get("uninvited"):
                self.roster.invite_again(node)
            logger.info("Round %d: %d of %d clients have answered.", self.round, len(updates), len(self._asked))
        for number in self._client_of.values():
            if number not in updates and number not in self._missing:
                self._miss(number)
        return updates

    def _most_bytes(self, number: int) -> int:
        """Of an update of this client; what it may send beyond is not its client's to count."""
        held = self._held[number]
        return sum(t.nbytes for side in self.method.trains for t in getattr(held, side).values())

    def _miss(self, number: int) -> None:
        self._misses[number] = self._misses.get(number, 0) + 1
        pause = min(2 ** (self._misses[number] - 1), LONGEST_PAUSE)
        self._paused_until[number] = self.round + 1 + pause
        seconds = self.rules.deadline_seconds
        self._missing[number] = self._notices[number] = f"it did not answer within {seconds:g} s"

    def bytes_moved(self, client: ClientPlan) -> tuple[int, int]:
        """What really crossed the wire: nothing to a client that was not asked, nothing from one that is silent."""
        down, up = self._moved[client.client_id]
        return down, up
