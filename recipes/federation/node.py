"""One node of a federation: one client, its rows and its model.

    python recipes/federation/node.py --client_id 0 --data rows.jsonl --superlink server.example.org:8000 \\
        --root_certificates ca.crt --private_key node.key

Holds the model, starts Flower's SuperNode beside itself, and answers until it is stopped; then both end.
"""

import argparse
import ctypes
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from fslora_hf.federation.flower import SOCKET  # checks Flower's version, before anything slow
from fslora_hf.federation.link import serve

SETTLED_SECONDS = 20.0  # a SuperNode that ends sooner was given something wrong


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--client_id", type=int, required=True, help="which client this is: a number from 0 on that no other node has")
    add("--data", help="its rows: a file, a folder or a data set, as a recipe's `dataset`; none: its client's part of "
        "the recipe's own rows")  # fmt: skip
    add("--model", help="a folder with the recipe's model, in place of its model_name_or_path")
    add("--rank", type=int, help="the rank that it can train; none: the recipe's")
    add("--dtype", choices=["float32", "bfloat16", "float16"], help="precision of the base model, in place of the "
        "recipe's")  # fmt: skip
    add("--device", help="cpu, or a GPU such as cuda:1, in place of the recipe's")
    add("--folder", help="for what outlasts this process: with `error_feedback`, what updates left out; none: it is "
        "forgotten when the node ends")  # fmt: skip
    add("--superlink", required=True, help="the SuperLink's address, host:port")
    add("--port", type=int, default=9094, help="of the SuperNode's own service on this machine, another for each node")
    add("--root_certificates", help="the certificate of who signed the SuperLink's; none: the system's")
    add("--private_key", help="this node's key, whose public half the SuperLink knows")
    add("--insecure", action="store_true", help="without TLS: on a machine or a network that nobody else is on")
    return parser.parse_args()


class SuperNode:
    """Flower's SuperNode beside this process. One that ends after it has worked, as when the SuperLink was started
    anew, is started anew, too; the model stays where it is."""

    def __init__(self, options: argparse.Namespace, path: str):
        self._command = ["flower-supernode", "--superlink", options.superlink, "--port", str(options.port)]
        self._command += ["--node-config", f'{SOCKET}="{path}"']
        if options.insecure:
            self._command += ["--insecure"]
        elif options.root_certificates:
            self._command += ["--root-certificates", options.root_certificates]
        if options.private_key:
            self._command += ["--auth-supernode-private-key", options.private_key]
        self._start()

    def _start(self) -> None:
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
        self._started = time.monotonic()
        self._process = subprocess.Popen(self._command, env={**os.environ, "PATH": path}, preexec_fn=_end_with_parent)

    def check(self) -> None:
        """Start it anew if it has ended; leave this process if it did so at once."""
        code = self._process.poll()
        if code is None:
            return
        if time.monotonic() - self._started < SETTLED_SECONDS:
            sys.exit(f"Expected the SuperNode to stay, found that it ended with exit code {code}: its message stands "
                     "above.")  # fmt: skip
        logging.warning("The SuperNode has ended with exit code %d and is started anew.", code)
        self._start()

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait()


def _end_with_parent() -> None:
    """Have the kernel end this process when the one that started it ends, however that comes about (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def main() -> None:
    options = parse()
    device, _, number = (options.device or "").partition(":")
    if number:
        os.environ["CUDA_VISIBLE_DEVICES"] = number  # before torch is loaded: the only one that it then knows
    logging.basicConfig(level=logging.WARNING, format=f"client {options.client_id}: %(message)s")
    logging.getLogger("fslora_hf").setLevel(logging.INFO)
    from fslora_hf.federation.node import Node, NodeSettings
    from fslora_hf.federation.packet import Packet

    with tempfile.TemporaryDirectory(prefix="fslora-node-") as folder:
        node = Node(
            NodeSettings(
                client_id=options.client_id,
                folder=str(Path(folder) / "trainer"),
                data=options.data,
                model=options.model,
                rank=options.rank,
                dtype=options.dtype,
                device=device or None,
                memory=options.folder,
            )
        )
        path = str(Path(folder) / "link" / "socket")
        supernode = SuperNode(options, path)
        try:
            serve(path, lambda blob: node.answer(Packet.from_bytes(blob)).to_bytes(), alive=supernode.check)
        except KeyboardInterrupt:
            pass
        finally:
            supernode.stop()


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    main()
