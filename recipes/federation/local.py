"""A whole federation on this machine: a SuperLink, a node for each client, one run; everything is stopped at its end.

    python recipes/federation/local.py --recipe recipes/smollm2_135m/federation.yaml --ranks 2 4 8 16

What `make federation` runs, and a way to try a recipe out before its nodes are other machines. On loopback, without
TLS. Settings of the recipe can be given, too.
"""

import argparse
import contextlib
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import yaml

from fslora_hf.federation.flower import check_flower
from fslora_hf.storage.folders import unused_folder

HERE = Path(__file__).resolve().parent
BIN = Path(sys.executable).parent  # where Flower's commands are


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", required=True, help="a recipe's YAML file")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4, 8, 16], help="of the clients, a node each")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in output_dir")
    options, options.overrides = parser.parse_known_args()
    return options


def where(options: argparse.Namespace) -> list[str]:
    """Where a run goes that is new and for which no folder was named: where its recipe says, unless a run is there."""
    if options.resume or any(text.partition("=")[0] == "--output_dir" for text in options.overrides):
        return []
    with contextlib.suppress(OSError, ValueError, RecursionError, yaml.YAMLError, KeyError, TypeError):
        named = yaml.safe_load(Path(options.recipe).read_text(encoding="utf-8"))["output_dir"]
        if isinstance(named, str):
            return ["--output_dir", unused_folder(named)]
    return []  # what is wrong with a recipe, the run tells


class Machine:
    """The processes of a federation on this machine, each with a log of its own in a folder.

    Args:
        folder: for logs, and for what Flower keeps.
        environment: variables over this process's.
    """

    def __init__(self, folder: Path, environment: dict[str, str] | None = None):
        self.folder = folder
        self.port, self._next = _free_port(), 0
        self.processes: dict[str, subprocess.Popen] = {}
        path = f"{BIN}{os.pathsep}{os.environ.get('PATH', '')}"
        home = {"PATH": path, "FLWR_HOME": str(folder / "flower"), "FLWR_TELEMETRY_ENABLED": "0",
                "FLWR_DISABLE_UPDATE_CHECK": "1", "OMP_NUM_THREADS": "1"}  # fmt: skip
        self.environment = {**os.environ, **home, **(environment or {})}
        (folder / "flower").mkdir(parents=True, exist_ok=True)
        self._connection = {"address": f"127.0.0.1:{self.port}", "insecure": True}

    def start(self, name: str, command: list[str]) -> subprocess.Popen:
        """Start a process in a group of its own, so that whatever it starts can be stopped with it."""
        with open(self.folder / f"{name}.log", "ab") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, env=self.environment, start_new_session=True)
        self.processes[name] = process
        return process

    def start_superlink(self, *options: str) -> None:
        """Returns once it answers."""
        command = ["flower-superlink", "--port", str(self.port), "--disable-runtime-dependency-installation"]
        process = self.start("superlink", [str(BIN / command[0]), *command[1:], *(options or ["--insecure"])])
        end = time.monotonic() + 60
        while time.monotonic() < end and process.poll() is None:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=1):
                return
            time.sleep(0.2)
        raise RuntimeError(f"Expected the SuperLink to listen on port {self.port}, found that it does not: see "
                           f"{self.folder / 'superlink.log'}.")  # fmt: skip

    def start_node(self, client: int, *options: str, script: Path = HERE / "node.py") -> subprocess.Popen:
        secure = [] if "--root_certificates" in options else ["--insecure"]
        command = [sys.executable, str(script), "--client_id", str(client), "--superlink", f"127.0.0.1:{self.port}"]
        return self.start(f"node-{client}", [*command, "--port", str(_free_port()), *secure, *options])

    def flwr(self, *arguments: str) -> str:
        """What one of Flower's commands says, once it has ended well."""
        self._write_connection()
        done = subprocess.run([str(BIN / "flwr"), *arguments], env=self.environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"Expected `flwr {' '.join(arguments)}` to end well, found: {done.stdout}{done.stderr}")
        return done.stdout

    def outcome(self) -> str:
        """How the last run ended, in Flower's words: `flwr run` itself says that all is well whatever happened."""
        runs = json.loads(self.flwr("ls", "local", "--format", "json"))["runs"]
        return max(runs, key=lambda run: run["pending-at"])["status"]

    def _write_connection(self) -> None:
        connection = "".join(f"{key} = {_toml(value)}\n" for key, value in self._connection.items())
        (self.folder / "flower" / "config.toml").write_text(
            f'[superlink]\ndefault = "local"\n\n[superlink.local]\n{connection}'
        )

    def run(
        self, recipe: str, overrides: list[str], stdout=None, app: Path = HERE / "app", **settings
    ) -> subprocess.Popen:
        """Start a run of a recipe, with `settings` of the app; the process says what the run says and ends with it."""
        self._write_connection()
        config = {"recipe": str(Path(recipe).resolve()), "overrides": shlex.join(overrides), **settings}
        path = self.folder / "run.toml"
        path.write_text("".join(f"{key.replace('_', '-')} = {_toml(value)}\n" for key, value in config.items()))
        command = [str(BIN / "flwr"), "run", str(app), "local", "--stream", "--run-config", str(path)]
        return subprocess.Popen(
            command, env=self.environment, start_new_session=True, stdout=stdout, stderr=subprocess.STDOUT
        )

    def trust(self, certificate: Path) -> None:
        """Speak TLS with the SuperLink, by this certificate of who signed its own."""
        self._connection = {"address": f"127.0.0.1:{self.port}", "root-certificates": str(certificate)}

    def stop(self) -> None:
        """Stop everything that was started, and what that started."""
        for process in self.processes.values():
            signal_group(process, signal.SIGTERM)
        end = time.monotonic() + 10
        for process in self.processes.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.1, end - time.monotonic()))
            signal_group(process, signal.SIGKILL)
            process.wait()


def signal_group(process: subprocess.Popen, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def _toml(value: bool | int | float | str) -> str:
    return json.dumps(value)  # TOML writes these as JSON does


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def machine(folder: Path | None = None) -> Iterator[Machine]:
    """A Machine that is stopped at the end, however that comes about."""
    with contextlib.ExitStack() as stack:
        if folder is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fslora-federation-")))
        made = Machine(folder)
        stack.callback(made.stop)
        yield made


def main() -> None:
    check_flower()
    options = parse()
    options.overrides += (place := where(options))
    if place:
        print(f"The run's folder: {place[1]}", flush=True)
    folder = Path(tempfile.mkdtemp(prefix="fslora-federation-"))
    with machine(folder) as here:
        here.start_superlink()
        for client, rank in enumerate(options.ranks):
            here.start_node(client, "--rank", str(rank))
        print(f"A SuperLink and {len(options.ranks)} nodes are starting; logs in {folder}.", flush=True)
        count = len(options.ranks)
        run = here.run(options.recipe, options.overrides, clients=count, min_clients=count, resume=options.resume)
        try:
            run.wait()
            outcome = here.outcome()
        except KeyboardInterrupt:
            signal_group(run, signal.SIGTERM)
            outcome = "interrupted"
        print("Stopping the nodes and the SuperLink.", flush=True)
    if outcome != "finished:completed":
        sys.exit(f"Expected the run to be completed, found {outcome}: its message stands above, and logs are kept in "
                 f"{folder}.")  # fmt: skip
    shutil.rmtree(folder)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    main()
