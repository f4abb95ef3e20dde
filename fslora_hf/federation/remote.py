"""The rounds of a federation on its server: clients are asked over the wire, and what answers in time is folded."""

import logging
import math
import time
from collections.abc import Hashable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..engine import RoundEngine
from ..layout import Layout
from ..methods import ClientAdapter
from ..plan import ClientPlan
from ..trainer import FederatedSketchTrainer
from ..updates import RefusedUpdate, at_most
from .exchange import Exchange, answers
from .packet import Packet
from .roster import FederationError, Roster
from .tensors import to_numpy, to_tensor

logger = logging.getLogger(__name__)

LONGEST_PAUSE = 8  # rounds that a client is left in peace after it has missed deadlines


@dataclass(frozen=True)
class RoundRules:
    """When a round is over, and what is folded.

    Attributes:
        deadline_seconds: from when the clients are asked on.
        min_clients: updates that a round must have.
        max_update_norm: largest Frobenius norm of an update; None for no bound.
    """

    deadline_seconds: float
    min_clients: int
    max_update_norm: float | None = None


class RemoteEngine(RoundEngine):
    """A RoundEngine whose clients train elsewhere. Updates are folded in the simulator's order, whenever they came.

    Args: as RoundEngine's, and how clients are reached, who they are, and when a round is over.
    """

    def __init__(self, *, exchange: Exchange, roster: Roster, rules: RoundRules, **parts: Any):
        super().__init__(**parts)
        self.exchange, self.roster, self.rules = exchange, roster, rules
        if rules.max_update_norm is not None:
            self._transforms = (*self._transforms, at_most(rules.max_update_norm))
        self._notices: dict[int, str] = {}  # why the last update of a client was left out
        self._misses: dict[int, int] = {}  # deadlines that a client has missed in a row
        self._paused_until: dict[int, int] = {}  # the round from which on it is asked again
        self._moved: dict[int, list[bool]] = {}  # client -> whether its part went down, and came back

    def hand_over(self, wave: int) -> tuple[ClientPlan, ...]:
        """Send every client of the round its part; where they are too few, wait for nodes that come back in time."""
        self._wave, self._block = wave, ()
        self._asked: dict[int, Hashable] = {}
        self.roster.refresh()
        self.stack.load([])
        self._missing: dict[int, str] = {}
        self._held: dict[int, ClientAdapter] = {}
        self._begun = time.monotonic()
        clients = self.plan(self.round).clients
        self._moved = {client.client_id: [False, False] for client in clients}
        for client in clients:
            self._ask(client, self.rules.deadline_seconds, self._paused_until.get(client.client_id, 0))
        while len(self._asked) < self.rules.min_clients and self._seconds_left() > 0:
            logger.info("Round %d: %d clients are connected; waiting for more.", self.round, len(self._asked))
            time.sleep(min(self.exchange.poll_seconds, self._seconds_left()))
            self.roster.refresh()
            for client in clients:
                if client.client_id not in self._held:
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
            self._held[number] = self._receive(client)
            packet = self._question(client, self._held[number], node)
            self._asked[node] = self.exchange.send(node, packet, max(seconds, 0.01))
            self._moved[number][0] = True
            self._missing.pop(number, None)

    def _question(self, client: ClientPlan, held: ClientAdapter, node: int) -> Packet:
        header = {"kind": "train", "round": self.round, "client_id": client.client_id, "rank": client.rank,
                  "scale": held.scale, "notice": self._notices.pop(client.client_id, None)}  # fmt: skip
        if self.method.beside_global:  # the node draws its part from the seed, and computes beside the global adapter
            pair = {"A": self.server.A, "B": self.server.B}
        else:
            pair = {side: getattr(held, side) for side in self.method.trains}
            if self.roster.is_new(node):  # the side that is not trained, until it has come
                pair |= {side: getattr(held, side) for side in "AB"}
        return Packet(header, to_numpy(pair))

    def collect(self) -> None:
        """Wait until all have answered or the deadline is over, and fold what came and is sound.

        Raises:
            FederationError: fewer than `min_clients` updates came.
        """
        updates = self._await()
        # The order of the simulator's blocks: equal updates are then folded to equal bits.
        for client in sorted(self.plan(self.round).clients, key=lambda client: client.rank):
            number = client.client_id
            if number in updates:
                loss, A, B = updates[number]
                self._fold(client, loss, self._update(client, A, B, self._held[number]))
                *_, reason = self._outcomes[-1]
                if reason is not None:
                    self._missing[number] = self._notices[number] = reason
            else:
                self._outcomes.append((number, math.nan, math.nan, 0.0, self._missing[number]))
        self.abandon()
        accepted = len(self._outcomes) - len(self._missing)
        if accepted < self.rules.min_clients:
            reasons = "; ".join(f"client {number}: {why}" for number, why in sorted(self._missing.items()))
            raise FederationError(
                f"Expected the updates of at least min_clients={self.rules.min_clients} clients in round {self.round} "
                f"within {self.rules.deadline_seconds:g} s, found {accepted} ({reasons}): the rounds before it are "
                "kept; see to the nodes, or raise the deadline, and resume."
            )

    def _await(self) -> dict[int, tuple[float, dict, dict]]:
        """Client -> its loss and its change of A and B, of all that answer in time with what was asked for."""
        updates: dict[int, tuple[float, dict, dict]] = {}
        client_of = self.roster.clients_of(self._asked)
        plans = {client.client_id: client for client in self.plan(self.round).clients}
        for node, answer in answers(self.exchange, self._asked, self._seconds_left()):
            number = client_of[node]
            self._misses.pop(number, None)
            self._moved[number][1] = isinstance(answer, Packet) and answer.kind == "update"
            try:
                updates[number] = self._read(plans[number], answer)
                self.roster.is_known(node)
            except RefusedUpdate as refusal:
                self._missing[number] = self._notices[number] = str(refusal)
            if isinstance(answer, Packet) and answer.header.get("uninvited"):
                self.roster.invite_again(node)
            logger.info("Round %d: %d of %d clients have answered.", self.round, len(updates), len(self._asked))
        for number in client_of.values():
            if number not in updates and number not in self._missing:
                self._miss(number)
        return updates

    def _miss(self, number: int) -> None:
        self._misses[number] = self._misses.get(number, 0) + 1
        pause = min(2 ** (self._misses[number] - 1), LONGEST_PAUSE)
        self._paused_until[number] = self.round + 1 + pause
        seconds = self.rules.deadline_seconds
        self._missing[number] = self._notices[number] = f"it did not answer within {seconds:g} s"

    def _read(self, client: ClientPlan, answer: Packet | str) -> tuple[float, dict, dict]:
        """A client's loss and its change of A and B, if they are what was asked for."""
        if isinstance(answer, str):
            raise RefusedUpdate(answer)
        if answer.kind != "update":
            raise RefusedUpdate(str(answer.header.get("reason", f"it answered with a packet of kind {answer.kind}")))
        loss, found = answer.header.get("loss"), answer.header.get("round")
        if found != self.round or answer.header.get("client_id") != client.client_id:
            raise RefusedUpdate(f"the update is of round {found}, client {answer.header.get('client_id')}")
        held = self._held[client.client_id]
        sides = []
        for side in ("A", "B"):
            parts = getattr(held, side) if side in self.method.trains else {}
            sides.append({module: _tensor(answer, f"{side}.{module}", part) for module, part in parts.items()})
        surplus = sorted(
            answer.tensors.keys() - {f"{s}.{m}" for s, side in zip("AB", sides, strict=True) for m in side}
        )
        if surplus:
            raise RefusedUpdate(f"the update holds {surplus[0]}, which was not asked for")
        return float(loss) if isinstance(loss, (int, float)) else math.nan, *sides

    def _bytes_moved(self, client: ClientPlan) -> tuple[int, int]:
        """What really crossed the wire: nothing to a client that was not asked, nothing from one that is silent."""
        down, up = self._moved[client.client_id]
        bytes_down, bytes_up = super()._bytes_moved(client)
        return bytes_down * down, bytes_up * up


def _tensor(answer: Packet, name: str, like: torch.Tensor) -> torch.Tensor:
    array = answer.tensors.get(name)
    if array is None:
        raise RefusedUpdate(f"the update lacks {name}")
    if array.shape != tuple(like.shape):
        raise RefusedUpdate(f"the update holds {name} of shape {array.shape}, not {tuple(like.shape)}")
    expected = str(like.dtype).removeprefix("torch.")
    if str(array.dtype) != expected:
        raise RefusedUpdate(f"the update holds {name} as {array.dtype}, not {expected}")
    return to_tensor(array, like)


class FederationTrainer(FederatedSketchTrainer):
    """FederatedSketchTrainer on a federation's server: everything of a round but its local steps, which nodes take.

    Its rows are placeholders that say whose each example is, and that is all that is known of them here. Checkpoints,
    evaluation, the Hub, the ledger and resuming are the simulator's.

    Args: as FederatedSketchTrainer's, with `exchange`, `roster` and `rules` before them.
    """

    def __init__(self, exchange: Exchange, roster: Roster, rules: RoundRules, **kwargs):
        self._roster = roster
        self._engine_class = partial(RemoteEngine, exchange=exchange, roster=roster, rules=rules)
        super().__init__(**kwargs)

    def _lay_out(self, block_size):
        # The second of two processes, which idles while the first, the nodes, trains all clients in one wave.
        self.layout = Layout(self.cohort_size, local_steps=1, block_size=self.cohort_size, processes=2, process=1)

    def _open_run(self) -> None:
        super()._open_run()
        self._roster.save(Path(self.args.output_dir))  # only now is it known that no other run lies there

    @property
    def _slots(self) -> int:
        return 1

    def _interrupted(self) -> None:
        # The last whole round may not have been saved yet.
        if self._engine is not None and self.rounds_done:
            self._engine.abandon()
            self.control.should_training_stop = True
            self.state.global_step = self.rounds_done + 1  # as within the next one
            self._save_checkpoint(self.model, None)

    def _clip_grad_norm(self, model):
        return torch.zeros(())

    def log(self, logs, start_time=None):
        # Local steps are taken elsewhere: of their loss the round's own log tells.
        super().log({name: value for name, value in logs.items() if name not in ("loss", "grad_norm")}, start_time)
