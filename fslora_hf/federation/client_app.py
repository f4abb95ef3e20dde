"""The Flower ClientApp: passes packets on to the process that holds this node's model, and its answers back.

`messenger.py` runs it, in a process for every message, which loads neither torch nor the model: those stay where they
are. The app that `flwr run` uploads names it, too, as Flower wants one; on a node that one is not run.
"""

from .flower import SOCKET, unwrap, wrap  # first: it checks Flower's version
from .link import ask

from flwr.app import Context, Message  # isort: skip
from flwr.clientapp import ClientApp  # isort: skip

app = ClientApp()


@app.query()
@app.train()
def answer(message: Message, context: Context) -> Message:
    path = context.node_config.get(SOCKET)
    if not isinstance(path, str):
        raise ValueError(f"Expected {SOCKET} in the node's configuration, found {sorted(context.node_config)}: start "
                         "the node with recipes/federation/node.py.")  # fmt: skip
    return Message(wrap(ask(path, unwrap(message.content))), reply_to=message)
