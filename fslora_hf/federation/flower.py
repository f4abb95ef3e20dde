"""What both Flower apps need: Flower of a version that they were written for, and packets in its messages."""

import re
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from ..common.foreign_text import foreign_names

if TYPE_CHECKING:
    from flwr.app import RecordDict

MAJOR = 1  # of flwr
SOCKET = "fslora-socket"  # key in a node's configuration: where the process that holds the model listens


def check_flower() -> None:
    """Refuse to go on without Flower, or with one of another major version.

    Raises:
        ImportError: says what was expected, what was found and how to mend it.
    """
    remedy = "pip install 'fslora_hf[flower]'"
    try:
        found = version("flwr")
    except PackageNotFoundError:
        raise ImportError(f"Expected flwr {MAJOR}, found none: {remedy}.") from None
    number = re.match(r"\d+", found)
    if number is None or int(number[0]) != MAJOR:
        raise ImportError(f"Expected flwr {MAJOR}, found {found}: {remedy}.")


def other_insides(error: ImportError) -> ImportError:
    """What to raise where a part of Flower that is not public is not where it was."""
    return ImportError(f"Expected flwr as in constraints.txt, found {version('flwr')}, of which a node cannot use "
                       f"what it needs ({error}): pip install -c constraints.txt 'fslora_hf[flower]'.")  # fmt: skip


check_flower()

KEY, FORMAT = "packet", "fslora_hf"


def wrap(packet: bytes) -> "RecordDict":
    """A packet as the content of a message; Flower sends it in chunks, and checks them by their hashes."""
    from flwr.app import Array, ArrayRecord, RecordDict

    return RecordDict({KEY: ArrayRecord({KEY: Array("uint8", (len(packet),), FORMAT, packet)})})


def unwrap(content: "RecordDict") -> bytes:
    """The packet in the content of a message.

    Raises:
        ValueError: there is none.
    """
    try:
        array = content.array_records[KEY][KEY]
    except KeyError:
        raise ValueError(f"Expected a message with a packet, found {foreign_names(set(content))}.") from None
    return array.data
