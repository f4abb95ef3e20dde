"""What crosses the wire: a header of plain JSON values and named tensors, together one safetensors file.

Nothing in it is code, and nothing in it is executed. Knows numpy and safetensors only, so that the process that passes
packets on starts in a moment.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from ..common.foreign_text import LONGEST_NAME, LONGEST_REASON, foreign_text, foreign_value

MOST_HEADER = 1 << 20  # characters of a header, which holds a recipe at most
PROTOCOL = 1  # of the headers; a server and its nodes must agree on it


class PacketError(ValueError):
    """Bytes that are no packet, or a packet that lacks something."""


@dataclass(frozen=True)
class Packet:
    """A message between the server and a node.

    Attributes:
        header: its `kind`, and what else there is to say, as JSON values.
        tensors: by name, of any type that safetensors and numpy both have.
    """

    header: Mapping[str, Any]
    tensors: Mapping[str, np.ndarray] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        return str(self.header.get("kind"))

    @property
    def tensor_bytes(self) -> int:
        """Of the tensors, which is what the ledger counts."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def to_bytes(self) -> bytes:
        tensors = {name: np.ascontiguousarray(tensor) for name, tensor in self.tensors.items()}
        return save(tensors, metadata={"header": json.dumps({"protocol": PROTOCOL, **self.header})})

    @classmethod
    def from_bytes(cls, blob: bytes) -> "Packet":
        """The packet that these bytes are.

        Raises:
            PacketError: they are none, or one of another protocol.
        """
        try:
            tensors = load(blob)
            length = int.from_bytes(blob[:8], "little")
            text = json.loads(blob[8 : 8 + length])["__metadata__"]["header"]
            if len(text) > MOST_HEADER:
                raise ValueError(f"a header of {len(text):,} characters, more than {MOST_HEADER:,}")
            header = json.loads(text)
        except (SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
            what = f"{type(error).__name__}: {foreign_text(error)}"
            raise PacketError(f"Expected a packet, found bytes that cannot be read ({what}).") from error
        if not isinstance(header, dict) or header.get("protocol") != PROTOCOL:
            found = foreign_value(header.get("protocol") if isinstance(header, dict) else header, LONGEST_NAME)
            raise PacketError(f"Expected packets of protocol {PROTOCOL}, found {found}: use the same fslora_hf "
                              "on the server and on every node.")  # fmt: skip
        return cls(header, tensors)


def failed(reason: str) -> Packet:
    """The answer of a node that cannot do what it was asked to."""
    return Packet({"kind": "failed", "reason": foreign_text(reason, LONGEST_REASON)})


def reason_in(answer: "Packet | str") -> str:
    """Why an answer is not what was asked for, in its sender's words."""
    if isinstance(answer, Packet):
        kind = foreign_text(answer.kind, LONGEST_NAME)
        answer = answer.header.get("reason", f"it answered with a packet of kind {kind}")
    return foreign_text(answer, LONGEST_REASON)
