"""One node of a federation: one client, its rows and its model.

    python recipes/federation/node.py --client_id 0 --data rows.jsonl --superlink server.example.org:8000 \\
        --root_certificates ca.crt --private_key node.key

Holds the model, starts Flower's SuperNode beside itself, and answers until it is stopped; then both end.
"""

import argparse
import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from fslora_hf.federation.flower import SOCKET  # checks Flower's version, before anything slow
from fslora_hf.federation.link import end_with_parent, serve

SETTLED_SECONDS = 20.0  # a SuperNode that ends sooner was not let in
PAUSE_SECONDS = 15.0  # before it is tried again

# Of the environment, what Flower's processes are given beside PATH: where they find Python's packages and their own
# folder, and how they write.
NEEDED = (
    "HOME TMPDIR TZ LANG LC_ALL LC_CTYPE PYTHONPATH PYTHONHOME LD_LIBRARY_PATH FLWR_HOME FLWR_TELEMETRY_ENABLED "
    "FLWR_DISABLE_UPDATE_CHECK"
).split()
TO_OTHERS = (  # and the one that connects to the SuperLink
    "SSL_CERT_FILE SSL_CERT_DIR HTTPS_PROXY HTTP_PROXY ALL_PROXY NO_PROXY https_proxy http_proxy all_proxy no_proxy"
).split()


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
    add("--trust_code", action="store_true", help="train recipes that bring code: models with code of their own, "
        "methods in files of theirs")  # fmt: skip
    add("--superlink", required=True, help="the SuperLink's address, host:port")
    add("--port", type=int, default=9094, help="of the SuperNode's own service on this machine, another for each node "
        "(default: 9094)")  # fmt: skip
    add("--root_certificates", help="the certificate of who signed the SuperLink's; none: the system's")
    add("--private_key", help="this node's key, whose public half the SuperLink knows")
    add("--insecure", action="store_true", help="without TLS: on a machine or a network that nobody else is on")
    add("--patience_s", type=float, default=180.0, help="seconds to go on asking a SuperLink that does not let this "
        "node in: one that has just died counts as online for more than a minute (default: 180)")  # fmt: skip
    return parser.parse_args()


def check(options: argparse.Namespace) -> None:
    """Leave with a sentence where a file or the port that is named cannot be used, or Flower lacks what is needed."""
    try:
        from fslora_hf.federation import messenger  # noqa: F401
    except ImportError as error:
        sys.exit(str(error))
    for name in ("root_certificates", "private_key"):
        path = getattr(options, name)
        if path is not None and not Path(path).is_file():
            sys.exit(f"Expected --{name} to be a file, found none at {path}: correct the path.")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", options.port))
        except OSError:
            sys.exit(f"Expected port {options.port} to be free for this node's SuperNode, found it in use: give each "
                     "node of a machine a --port of its own.")  # fmt: skip


def environment(*names: str) -> dict[str, str]:
    """Of this process's environment what Flower's processes need and nothing else: no token, no key, no password."""
    return {name: os.environ[name] for name in (*NEEDED, *names) if name in os.environ}


class SuperNode:
    """Flower's SuperNode beside this process, and what answers its messages with this package's ClientApp: the
    SuperNode runs none itself (`--isolation process`), so that no app that `flwr run` brings is run here.

    If one of the two ends, as when the SuperLink was started anew, both are started anew, and tried again for a while
    if they are not let in at once; the model stays where it is.
    """

    def __init__(self, options: argparse.Namespace, path: str):
        command = ["flower-supernode", "--isolation", "process", "--superlink", options.superlink]
        command += ["--port", str(options.port), "--node-config", f'{SOCKET}="{path}"']
        if options.insecure:
            command += ["--insecure"]
        elif options.root_certificates:
            command += ["--root-certificates", options.root_certificates]
        if options.private_key:
            command += ["--auth-supernode-private-key", options.private_key]
        messenger = [sys.executable, "-m", "fslora_hf.federation.messenger", f"127.0.0.1:{options.port}"]
        self._commands = [(command, environment(*TO_OTHERS)), (messenger, environment())]
        self._processes: list[subprocess.Popen] = []
        self._key, self._patience = options.private_key, options.patience_s
        self._refused_since: float | None = None
        secured = "without TLS" if options.insecure else "over TLS"
        where = f"the SuperLink at {options.superlink} {secured}"
        print(f"Connecting to {where}; it is tried until it answers.", flush=True)
        self._start()

    def _start(self) -> None:
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
        self._started, self._again = time.monotonic(), None
        for command, variables in self._commands:
            given = {**variables, "PATH": path}
            self._processes.append(subprocess.Popen(command, env=given, preexec_fn=end_with_parent))

    def check(self) -> None:
        """Start it anew if it has ended; leave this process if it is not let in for too long."""
        now = time.monotonic()
        settled = now - self._started >= SETTLED_SECONDS
        if self._again is not None:
            if now >= self._again:
                self._start()
        elif (code := self._ended()) is not None:
            self.stop()
            self._take_up(now, settled, code)
        elif settled:
            self._refused_since = None

    def _ended(self) -> int | None:
        """The exit code of the one that has ended, if one has."""
        return next((code for one in self._processes if (code := one.poll()) is not None), None)

    def _take_up(self, now: float, settled: bool, code: int) -> None:
        """Start what has ended anew, at once or after a pause."""
        if settled:
            logging.warning("The SuperNode has ended with exit code %d and is started anew.", code)
            self._start()
            return
        self._refused_since = self._refused_since or self._started
        if now - self._refused_since + PAUSE_SECONDS > self._patience:
            sys.exit(f"Expected the SuperNode to stay, found that it ended with exit code {code}: its message stands "
                     f"above. {self._advice()}")  # fmt: skip
        logging.warning("The SuperNode has ended with exit code %d; its message stands above. %s It is tried again in "
                        "%.0f s.", code, self._advice(), PAUSE_SECONDS)  # fmt: skip
        self._again = now + PAUSE_SECONDS

    def _advice(self) -> str:
        if self._key is None:
            return "If it was refused (2001), the SuperLink knows nodes by their keys: name this one's --private_key."
        return ("If it was refused (2004), the SuperLink does not know this key (flwr supernode register "
                f"{self._key}.pub), or counts a node that has died as online for a minute or two.")  # fmt: skip

    def stop(self) -> None:
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            process.wait()
        self._processes.clear()


def main() -> None:
    options = parse()
    check(options)
    device, _, number = (options.device or "").partition(":")
    if number:
        os.environ["CUDA_VISIBLE_DEVICES"] = number  # before torch is loaded: the only one that it then knows
    logging.basicConfig(level=logging.WARNING, format=f"client {options.client_id}: %(message)s")
    logging.getLogger("fslora_hf").setLevel(logging.INFO)
    from fslora_hf.federation.node import Node, NodeSettings

    with tempfile.TemporaryDirectory(prefix="fslora-node-") as folder:
        settings = NodeSettings(
            client_id=options.client_id,
            folder=str(Path(folder) / "trainer"),
            data=options.data,
            model=options.model,
            rank=options.rank,
            dtype=options.dtype,
            device=device or None,
            memory=options.folder,
            trusts_code=options.trust_code,
        )
        try:
            node = Node(settings)
        except FileNotFoundError as error:
            sys.exit(str(error))
        path = str(Path(folder) / "link" / "socket")
        supernode = SuperNode(options, path)
        try:
            serve(path, node.answer_bytes, alive=supernode.check)
        except KeyboardInterrupt:
            pass
        finally:
            supernode.stop()


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    main()
