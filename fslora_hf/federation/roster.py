"""Who takes part in a federation: which node is which client, of which rank, with how many examples."""

import json
import logging
import re
import secrets
import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..common.foreign_text import LONGEST_NAME, LONGEST_REASON, foreign_names, foreign_text, foreign_value
from ..storage.files import make_folder, write_text
from .exchange import Exchange, answers
from .packet import Packet, reason_in
from .standing import Standing

logger = logging.getLogger(__name__)

MOST_EXAMPLES = 10_000_000  # of a client; the server holds a placeholder for each
INVITE_AGAIN_SECONDS = 60.0  # after a node could not join: it may be mended, or was only late
ROSTER_NAME = "federation.json"  # in a run's folder
CLAIM_SECONDS = 30.0  # for a node whose client another claims to say that it is still there


class FederationError(RuntimeError):
    """A federation that cannot go on; what it has learned is kept."""


@dataclass(frozen=True)
class Member:
    """A client of the federation.

    Attributes:
        client_id: which one.
        examples: rows that it trains on.
        rank: what it affords by its own word; None leaves it to the recipe.
        node: the connected node that is this client; None while there is none.
    """

    client_id: int
    examples: int
    rank: int | None
    node: int | None


class Roster:
    """The members of a federation. Nodes that connect are asked who they are, and are members once that fits.

    Args:
        exchange: carries the questions.
        invitation: the question, which tells a node what is to be trained.
        own: what the server trains with.
        join_seconds: how long a node may take to answer; it loads its model meanwhile.
        most_rank: that a client can have; None: any.
    """

    def __init__(
        self,
        exchange: Exchange,
        invitation: Packet,
        own: Standing,
        join_seconds: float,
        most_rank: int | None = None,
    ):
        # Tells a node which server's parts it is to train, whatever else has invited it since.
        self.session = secrets.token_hex(8)
        self._invitation = Packet({**invitation.header, "session": self.session})
        self._exchange, self._own = exchange, own
        self._join_seconds, self._most_rank = join_seconds, most_rank
        self._asked: dict[Hashable, int] = {}
        self._again: dict[int, float] = {}  # node -> when it is invited again
        self._seen: set[int] = set()
        self.members: dict[int, Member] = {}
        self.run = secrets.token_hex(8)  # tells nodes this run from others
        self.turned_away: dict[int, str] = {}
        self._told: dict[int, str] = {}  # node -> why it was turned away, as the log has it
        self._closed = False
        self._new: set[int] = set()

    def wait(self, wanted: int | None, least: int, seconds: float) -> None:
        """Let nodes join until there are as many as wanted, or, when so many seconds are over, at least `least`.

        Raises:
            FederationError: there are fewer.
        """
        end, told = time.monotonic() + seconds, None
        while True:
            self.refresh()
            present = len(self.present())
            if wanted is not None and present >= wanted:
                return
            if present != told:
                most = "any number of" if wanted is None else wanted
                logger.info("%d of %s clients have joined; waiting %.0f s for more.", present, most,
                            end - time.monotonic())  # fmt: skip
                told = present
            if time.monotonic() >= end:
                break
            time.sleep(min(self._exchange.poll_seconds, max(0.0, end - time.monotonic())))
        if present < least:
            raise FederationError(
                f"Expected at least min-clients={least} clients within {seconds:g} s, found {present}"
                f"{self._reasons()}: start more nodes, or lower min-clients."
            )

    def _reasons(self) -> str:
        told = [f"node {node} was turned away: {reason}" for node, reason in sorted(self.turned_away.items())]
        return f" ({foreign_names(told, longest=LONGEST_REASON, between=' ')})" if told else ""

    def present(self) -> dict[int, Member]:
        """The members whose node is connected, by client."""
        return {client: member for client, member in self.members.items() if member.node is not None}

    def close(self) -> None:
        """Take no new clients from now on; nodes of those there are may come and go."""
        self._closed = True

    def refresh(self) -> None:
        """Forget nodes that have left, ask new ones who they are, and take in what was answered."""
        connected = self._exchange.nodes()
        for client, member in self.present().items():
            if member.node not in connected:
                logger.warning("Client %d is gone: node %d is no longer connected.", client, member.node)
                self.members[client] = replace(member, node=None)
        self._again = {node: at for node, at in self._again.items() if node in connected}
        self._seen &= connected - {node for node, at in self._again.items() if at <= time.monotonic()}
        self._new &= connected
        self.turned_away = {node: reason for node, reason in self.turned_away.items() if node in connected}
        self._told = {node: reason for node, reason in self._told.items() if node in connected}
        self._asked = {ticket: node for ticket, node in self._asked.items() if node in connected}
        for node in sorted(connected - self._seen):
            self._asked[self._exchange.send(node, self._invitation, self._join_seconds)] = node
            self._seen.add(node)
            self._again.pop(node, None)
        for ticket, answer in self._exchange.receive(list(self._asked)).items():
            self._take_in(self._asked.pop(ticket), answer)

    def _take_in(self, node: int, answer: Packet | str) -> None:
        reasons = list(self._objections(node, answer))
        if not reasons:
            header = answer.header
            self.members[header["client_id"]] = Member(
                header["client_id"], header["examples"], header.get("rank"), node
            )
            self.turned_away.pop(node, None)
            self._told.pop(node, None)
            self._new.add(node)
            logger.info("Client %d has joined: node %d, %d examples.", header["client_id"], node, header["examples"])
            return
        self.turned_away[node] = foreign_names(reasons, longest=LONGEST_REASON, between=" ")
        self._again[node] = time.monotonic() + INVITE_AGAIN_SECONDS
        if self._told.get(node) != self.turned_away[node]:  # it is asked again every minute
            self._told[node] = self.turned_away[node]
            logger.warning("Node %d was turned away: %s", node, self.turned_away[node])
        if isinstance(answer, Packet) and answer.kind == "joined":
            notice = Packet({"kind": "turned_away", "reason": self.turned_away[node]})
            self._exchange.send(node, notice, self._join_seconds)

    def _objections(self, node: int, answer: Packet | str) -> Iterator[str]:
        """Why a node that answered cannot be a member, a sentence each."""
        if isinstance(answer, str) or answer.kind != "joined":
            yield reason_in(answer)
            return
        header = answer.header
        client, examples, rank = (header.get(name) for name in ("client_id", "examples", "rank"))
        if not _is_member(client, examples, rank):
            found = [foreign_value(value, LONGEST_NAME) for value in (client, examples, rank)]
            yield (f"Expected a client from 0 on, at least one example and a rank from 1 on, found {found[0]}, "
                   f"{found[1]} and {found[2]}: correct the node's settings.")  # fmt: skip
            return
        if examples > MOST_EXAMPLES:
            yield f"Expected at most {MOST_EXAMPLES:,} examples, found {examples:,}: give the node a part of its rows."
        if self._most_rank is not None and rank is not None and rank > self._most_rank:
            yield f"Expected a rank of at most lora_r={self._most_rank}, found {rank}: give the node a lower --rank."
        standing = header.get("standing")
        yield from self._own.differences(standing if isinstance(standing, Mapping) else {})
        known = self.members.get(client)
        if known is None and self._closed:
            yield f"Expected a client of the run that is under way, found client {client}: join the next run."
        elif known is not None and known.node not in (None, node) and self._still_there(known.node):
            yield (f"Expected every client on one node, found client {client} on node {known.node} and on node "
                   f"{node}: give one of them another client_id.")  # fmt: skip
        elif known is not None and self._closed and (known.examples, known.rank) != (examples, rank):
            yield (f"Expected client {client} with {known.examples} examples and rank {known.rank} as when the run "
                   f"began, found {examples} and {rank}: restore them, or start a new run.")  # fmt: skip

    def _still_there(self, node: int) -> bool:
        ticket = self._exchange.send(node, Packet({"kind": "ping"}), CLAIM_SECONDS)
        return any(isinstance(answer, Packet) for _, answer in answers(self._exchange, {node: ticket}, CLAIM_SECONDS))

    # ---- The run's own clients ----

    def save(self, folder: Path) -> None:
        """Write who the run's clients are; a run that is resumed has the same."""
        rows = [{"client_id": m.client_id, "examples": m.examples, "rank": m.rank} for m in self.ordered()]
        text = json.dumps({"run": self.run, "clients": rows}, indent=1) + "\n"
        write_text(make_folder(folder) / ROSTER_NAME, text)

    def restore(self, folder: Path) -> bool:
        """Read what `save` wrote, as clients whose nodes are still to come; returns whether there was anything."""
        path = folder / ROSTER_NAME
        if not path.is_file():
            return False
        self.run, self.members = read_roster(path)
        self.close()
        return True

    def ordered(self) -> list[Member]:
        return [self.members[client] for client in sorted(self.members)]

    def ranks(self, recipe_rank: Callable[[int], int | None]) -> list[int]:
        """The ranks of the clients by ascending id: by their own word, else the recipe's.

        Raises:
            FederationError: there is neither.
        """
        ranks = [member.rank or recipe_rank(member.client_id) for member in self.ordered()]
        lacking = [member.client_id for member, rank in zip(self.ordered(), ranks, strict=True) if rank is None]
        if lacking:
            raise FederationError(f"Expected a rank of every client, found none of client {lacking[0]}, which the "
                                  "recipe's client_ranks do not have: start its node with a --rank.")  # fmt: skip
        return ranks

    def owners(self) -> np.ndarray:
        """Whose each example is, int64 `[examples]`: all that the server knows of the data."""
        return np.repeat([m.client_id for m in self.ordered()], [m.examples for m in self.ordered()]).astype(np.int64)

    def node_of(self, client: int) -> int | None:
        member = self.members.get(client)
        return None if member is None else member.node

    def is_new(self, node: int) -> bool:
        """Whether a node has joined and has not trained since."""
        return node in self._new

    def is_known(self, node: int) -> None:
        """Note that a node has what it needs to train."""
        self._new.discard(node)

    def invite_again(self, node: int) -> None:
        """Ask a node anew who it is: it was started again, unseen. Until it has answered it is nobody's."""
        self._seen.discard(node)
        for client, member in self.present().items():
            if member.node == node:
                self.members[client] = replace(member, node=None)


def read_roster(path: Path) -> tuple[str, dict[int, Member]]:
    """The number of a run, and its clients by their ids, as `Roster.save` wrote them.

    Raises:
        FederationError: the file is damaged.
    """
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        run, rows = saved["run"], saved["clients"]
        if not isinstance(run, str) or not re.fullmatch("[0-9a-f]{16}", run):
            raise ValueError(f"{foreign_value(run, LONGEST_NAME)} as the run's number")
        if not isinstance(rows, list) or not rows:
            raise ValueError("no list of clients")
        members = {}
        for row in rows:
            values = client, examples, rank = row["client_id"], row["examples"], row["rank"]
            if not _is_member(*values) or examples > MOST_EXAMPLES or client in members:
                raise ValueError(f"{foreign_value(row, LONGEST_NAME)} as a client")
            members[client] = Member(client, examples, rank, None)
    except (ValueError, KeyError, TypeError, RecursionError, OSError) as error:
        what = f"{type(error).__name__}: {foreign_text(error)}"
        raise FederationError(
            f"Expected the run's clients in {path}, found a file that is damaged ({what}): restore it from a backup, "
            "or start a new run in another output_dir."
        ) from error
    return run, members


def _is_member(client: Any, examples: Any, rank: Any) -> bool:
    """Whether these can be a client's number, how many examples it has, and its rank or None."""
    numbers = (client, examples, 1 if rank is None else rank)
    if not all(isinstance(number, int) and not isinstance(number, bool) for number in numbers):
        return False
    return 0 <= client < 2**31 and 1 <= examples < 2**63 and (rank is None or 1 <= rank < 2**31)
