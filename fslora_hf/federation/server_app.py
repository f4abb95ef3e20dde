"""The Flower ServerApp: a federated run over the nodes of a SuperLink."""

import logging
from collections.abc import Collection, Hashable, Mapping
from dataclasses import fields
from itertools import count
from typing import Any

from .flower import unwrap, wrap  # first: it checks Flower's version

from flwr.app import Context, Message, MessageType  # isort: skip
from flwr.serverapp import Grid, ServerApp  # isort: skip

from ..common.foreign_text import LONGEST_REASON, foreign_text
from ..rounds.watch import RunLost
from .packet import Packet, PacketError
from .roster import FederationError
from .server import FederationArguments, run_federation

logger = logging.getLogger(__name__)

app = ServerApp()


class FlowerExchange:
    """Packets as Flower's messages, one each."""

    poll_seconds = 0.5

    def __init__(self, grid: Grid):
        self._grid = grid
        self._unsent: dict[Hashable, str] = {}
        self._number = count()

    def nodes(self) -> set[int]:
        return set(self._grid.get_node_ids())

    def send(self, node: int, packet: Packet, seconds: float) -> Hashable:
        kind = MessageType.TRAIN if packet.kind == "train" else MessageType.QUERY
        group = str(packet.header.get("round", packet.kind))
        message = Message(wrap(packet.to_bytes()), node, kind, ttl=seconds, group_id=group)
        tickets = list(self._grid.push_messages([message]))
        if tickets and tickets[0] is not None:
            return tickets[0]
        ticket = f"unsent {next(self._number)}"  # Flower did not take it
        self._unsent[ticket] = "the node could not be reached: it has left, or the message is too large for Flower"
        return ticket

    def receive(self, tickets: Collection[Hashable]) -> dict[Hashable, Packet | str]:
        come: dict[Hashable, Packet | str] = {
            ticket: self._unsent.pop(ticket) for ticket in tickets if ticket in self._unsent
        }
        waiting = [ticket for ticket in tickets if ticket not in come]
        for reply in self._grid.pull_messages(waiting) if waiting else ():
            come[reply.metadata.reply_to_message_id] = _read(reply)
        return come


def _read(reply: Message) -> Packet | str:
    if reply.has_error() and "Message Unavailable" in reply.error.reason:  # Flower's word for a message that expired
        return "the node had not answered when its time was over; if its model loads for longer, raise join-deadline-s"
    if reply.has_error():
        return f"the node answered with an error: {foreign_text(reply.error.reason)}"
    try:
        return Packet.from_bytes(unwrap(reply.content))
    except (PacketError, ValueError) as error:
        return foreign_text(error, LONGEST_REASON)


def read_run_config(run_config: Mapping[str, Any]) -> FederationArguments:
    """The settings of a federation from Flower's; an empty text or 0 stands for the default, as TOML has no none, but
    where 0 turns a bound off."""
    given = {key.replace("-", "_"): value for key, value in run_config.items() if value or key == "max-norm-ratio"}
    settings = {each.name: given[each.name] for each in fields(FederationArguments) if each.name in given}
    return FederationArguments(**settings)


@app.main()
def main(grid: Grid, context: Context) -> None:
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("fslora_hf").setLevel(logging.INFO)
    try:
        print(run_federation(read_run_config(context.run_config), FlowerExchange(grid)), flush=True)
    except (ValueError, OSError, FederationError, RunLost) as error:  # whose text says it all, without the way it came
        raise error.with_traceback(None) from None
