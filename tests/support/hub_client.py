"""Fixtures that run a test's functions in a second Python, whose Hugging Face clients talk to the test Hub.

The clients read their endpoint and how they upload when they are imported, and the tests' own process is offline from
the start. A test file says `pytest_plugins = ("tests.support.hub_client",)`.
"""

import gc
import multiprocessing
import os
import shutil
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from fslora_hf.hub.outbox import OUTBOX_NAME, Outbox
from tests.support.hub_calls import OTHER, READS, WRITES
from tests.support.hub_server import HubServer

# Not for the clients: tokens and caches of whoever runs the tests, and proxies that have no way to 127.0.0.1.
_UNSET = ("HF_TOKEN", "HF_HUB_CACHE", "HF_ASSETS_CACHE", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy")


class _Clients:
    """The one server of the session, and its client processes: one for each mode of upload, started when asked for."""

    def __init__(self, server: HubServer, home: Path, stack: ExitStack):
        self.server = server
        self._home, self._stack = home, stack
        self._started: dict[str, ProcessPoolExecutor] = {}

    def environment(self, mode: str) -> dict[str, str | None]:
        """What the environment of a client differs in; None: not set."""
        return dict.fromkeys(_UNSET) | {
            "HF_ENDPOINT": self.server.url,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_XET": "1" if mode == "lfs" else "0",
            "HF_HOME": str(self._home / mode),
        }

    def process(self, mode: str) -> ProcessPoolExecutor:
        """The client process of a mode."""
        if mode not in self._started:
            with pytest.MonkeyPatch.context() as changed:
                for name, value in self.environment(mode).items():
                    changed.delenv(name, raising=False) if value is None else changed.setenv(name, value)
                pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _stay_here)
                self._started[mode] = self._stack.enter_context(pool)
                pool.submit(int).result()  # the process starts here, with this environment
        return self._started[mode]


@pytest.fixture(scope="session")
def _clients(tmp_path_factory):
    if shutil.which("git") is None:
        pytest.skip("Expected git, in which the test Hub keeps its repositories, found none: install it.")
    with ExitStack() as stack:
        server = stack.enter_context(HubServer(page_size=3))
        yield _Clients(server, tmp_path_factory.mktemp("hf_home"), stack)


@pytest.fixture(params=["lfs", "regular"])
def upload_mode(request) -> str:
    """A test that takes this runs twice: large files go beside the commit by LFS, or within it as all others do."""
    return request.param


def _mode(request: pytest.FixtureRequest) -> str:
    return request.getfixturevalue("upload_mode") if "upload_mode" in request.fixturenames else "regular"


@pytest.fixture
def hub(_clients, request) -> HubServer:
    """The test Hub, empty, and without users."""
    _clients.server.clear()
    _clients.server.upload_mode = _mode(request)
    yield _clients.server
    _clients.server.mend()  # what still waits must not keep the client from the next test


@pytest.fixture
def users(hub) -> dict[str, dict]:
    """Three tokens: of `user` to write (and for `team`), of `user` to read only, and of someone else to write."""
    hub.users[WRITES] = {"name": "user", "role": "write", "orgs": ["team"]}
    hub.users[READS] = {"name": "user", "role": "read", "orgs": []}
    hub.users[OTHER] = {"name": "other", "role": "write", "orgs": []}
    return hub.users


@pytest.fixture
def outbox(tmp_path) -> Outbox:
    """An outbox without rounds."""
    return Outbox(tmp_path / OUTBOX_NAME)


@pytest.fixture
def client_environment(_clients, request, tmp_path) -> dict[str, str]:
    """The environment of a program, started by the test, that talks to the test Hub with empty caches."""
    changes = _clients.environment(_mode(request)) | {"HF_HOME": str(tmp_path / "home")}
    return {name: value for name, value in (os.environ | changes).items() if value is not None}


@pytest.fixture
def on_client(_clients, request, tmp_path) -> Callable[..., Any]:
    """`on_client(function, *args)` runs a function of a module in the client process and returns what it returns.

    Each test starts with empty caches: a data set that cannot be loaded would be taken from there.
    """
    client = _clients.process(_mode(request))

    def run(function: Callable, *args, **kwargs) -> Any:
        return client.submit(function, *args, **kwargs).result(timeout=300)

    run(_use_caches, tmp_path / "client")
    return run


@pytest.fixture
def fork_client(_clients, request, on_client, tmp_path) -> Callable[..., "ForkOfClient"]:
    """`fork_client(function, *args)` calls a function in a process forked from the client, to be killed or waited for;
    the client's libraries are imported already, and its caches are the test's."""
    client, forks = _clients.process(_mode(request)), []

    def start(function: Callable, *args) -> ForkOfClient:
        said = tmp_path / f"said-{len(forks)}"
        forks.append(ForkOfClient(client, client.submit(_fork, str(said), function, args).result(60), said))
        return forks[-1]

    yield start
    for fork in forks:
        if fork.poll() is None:
            os.kill(fork.pid, signal.SIGKILL)
            fork.wait()


class ForkOfClient:
    """Much of subprocess.Popen for a process that the client waits for."""

    def __init__(self, client: ProcessPoolExecutor, pid: int, said: Path):
        self._client, self.pid, self._said, self.returncode = client, pid, said, None

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = self._client.submit(_ended, self.pid).result(60)
        return self.returncode

    def wait(self, timeout: float = 240) -> str:
        """Returns what it said."""
        end = time.monotonic() + timeout
        while self.poll() is None:
            assert time.monotonic() < end, self._said.read_text()[-3000:]
            time.sleep(0.05)
        return self._said.read_text()


def _fork(said: str, function: Callable, args: tuple) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        for number in (1, 2):
            os.dup2(os.open(said, os.O_CREAT | os.O_WRONLY | os.O_APPEND), number)
        function(*args)
        code = 0
    except SystemExit as end:
        code = end.code or 0
        if isinstance(code, str):
            print(code, file=sys.stderr)
            code = 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)


def _ended(pid: int) -> int | None:
    """A child's exit code, once it has ended."""
    ended, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if ended else None


def _use_caches(folder: Path) -> None:
    gc.collect()
    gc.freeze()  # each run of a trainer collects garbage
    import datasets
    from huggingface_hub import constants

    datasets.config.HF_DATASETS_CACHE = folder / "datasets"
    constants.HF_HUB_CACHE = str(folder / "hub")


def _stay_here() -> None:
    """Let the process reach this machine only (`datasets` also asks a second host beside its endpoint)."""
    look_up = socket.getaddrinfo

    def look_up_here(host, *args, **kwargs):
        if host not in ("127.0.0.1", b"127.0.0.1"):
            raise socket.gaierror(socket.EAI_NONAME, f"{host} is not the test Hub")
        return look_up(host, *args, **kwargs)

    socket.getaddrinfo = look_up_here
