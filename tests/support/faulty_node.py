"""recipes/federation/node.py with faults: a node that does wrong in chosen rounds, for tests of real processes.

The variable FSLORA_TEST_FAULTS names a JSON file, read at every packet that asks to train: a list of
`{"client": 2, "round": 1, "fault": "nan"}`, a fault one of FAULTS or `stall` with its `seconds` and, for one that ends
once a file is there, `until`; each is done once.
"""

import json
import math
import os
import runpy
import signal
import sys
import time
from pathlib import Path

import numpy as np

from fslora_hf.federation.node import Node
from fslora_hf.federation.packet import Packet

ROOT = Path(__file__).resolve().parents[2]


def _largest(packet: Packet, change) -> Packet:
    name = max(packet.tensors, key=lambda name: packet.tensors[name].size)
    return Packet(packet.header, {**packet.tensors, name: change(packet.tensors[name])})


FAULTS = {
    "nan": lambda packet: _largest(packet, lambda x: x * np.nan),
    "shape": lambda packet: _largest(packet, lambda x: x[:, :-1]),
    "norm": lambda packet: _largest(packet, lambda x: x + 1e9),
    # Below every fixed bound by default.
    "poison": lambda packet: _largest(packet, lambda x: np.full_like(x, 9.9e5 / math.sqrt(x.size))),
    "kill": lambda packet: os.kill(os.getpid(), signal.SIGKILL),
}


def stall(seconds: float, until: str | None) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end and not (until and Path(until).exists()):
        time.sleep(0.1)


def install() -> None:
    sound, done = Node.answer, set()

    def answer(node: Node, packet: Packet) -> Packet:
        answered = sound(node, packet)
        path = Path(os.environ["FSLORA_TEST_FAULTS"])
        if packet.kind != "train" or not path.exists():
            return answered
        for fault in json.loads(path.read_text()):
            key = json.dumps(fault)
            here = fault["client"] == node.settings.client_id and fault["round"] == packet.header["round"]
            if here and key not in done:
                done.add(key)
                if fault["fault"] == "stall":
                    stall(fault["seconds"], fault.get("until"))
                    return answered
                return FAULTS[fault["fault"]](answered)
        return answered

    Node.answer = answer


if __name__ == "__main__":
    install()
    sys.argv[0] = str(ROOT / "recipes/federation/node.py")
    runpy.run_path(sys.argv[0], run_name="__main__")
