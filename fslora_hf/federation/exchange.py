"""What the server needs of whatever carries its packets to nodes and back."""

import time
from collections.abc import Collection, Hashable, Iterator, Mapping
from typing import Protocol

from .packet import Packet


class Exchange(Protocol):
    """Carries packets. A node is known by a number that it keeps for as long as it is connected."""

    poll_seconds: float  # how long to wait before looking again for answers

    def nodes(self) -> set[int]:
        """The nodes that are connected now."""

    def send(self, node: int, packet: Packet, seconds: float) -> Hashable:
        """Send a packet that is of no use after so many seconds; returns a ticket for its answer."""

    def receive(self, tickets: Collection[Hashable]) -> dict[Hashable, "Packet | str"]:
        """The answers that have come, by ticket, each told once; a text says why there will be none."""


def answers(
    exchange: Exchange, tickets: Mapping[int, Hashable], seconds: float
) -> Iterator[tuple[int, "Packet | str"]]:
    """Nodes and their answers as they come, until all have answered or so many seconds are over.

    Of a node that is no longer connected there is nothing to wait for: its answer is a text that says so.
    """
    waiting, end = dict(tickets), time.monotonic() + seconds
    while waiting:
        # In this order: a node may answer and leave in between.
        connected = exchange.nodes()
        come = exchange.receive(list(waiting.values()))
        for node, ticket in list(waiting.items()):
            if ticket in come:
                del waiting[node]
                yield node, come[ticket]
            elif node not in connected:
                del waiting[node]
                yield node, "the node is no longer connected"
        left = end - time.monotonic()
        if waiting and left <= 0:
            return
        if waiting and not come:
            time.sleep(min(exchange.poll_seconds, left))
