"""Fixtures that run a test's functions in a second Python, whose Hugging Face clients talk to the test Hub.

The clients read their endpoint when they are imported, and the tests' own process is offline from the start. A test
file says `pytest_plugins = ("tests.hub_client",)`.
"""

import multiprocessing
import shutil
import socket
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.hub_server import HubServer


@pytest.fixture(scope="session")
def _hub_and_client(tmp_path_factory):
    """The one server and the one client process of the session."""
    if shutil.which("git") is None:
        pytest.skip("Expected git, in which the test Hub keeps its repositories, found none: install it.")
    with HubServer(page_size=3) as server, pytest.MonkeyPatch.context() as environment:
        environment.setenv("HF_ENDPOINT", server.url)
        environment.setenv("HF_HUB_OFFLINE", "0")
        environment.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        environment.setenv("HF_HOME", str(tmp_path_factory.mktemp("hf_home")))
        for name in (
            "HF_TOKEN",
            "HF_HUB_CACHE",
            "HF_ASSETS_CACHE",
            "HTTP_PROXY",
            "http_proxy",
            "ALL_PROXY",
            "all_proxy",
        ):
            environment.delenv(name, raising=False)
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _stay_here) as client:
            client.submit(int).result()  # the process starts here, with this environment
            environment.undo()
            yield server, client


@pytest.fixture
def hub(_hub_and_client) -> HubServer:
    """The test Hub, empty."""
    server, _ = _hub_and_client
    server.clear()
    return server


@pytest.fixture
def on_client(_hub_and_client, tmp_path) -> Callable[..., Any]:
    """`on_client(function, *args)` runs a function of a module in the client process and returns what it returns.

    Each test starts with empty caches: a data set that cannot be loaded would be taken from there.
    """
    _, client = _hub_and_client

    def run(function: Callable, *args, **kwargs) -> Any:
        return client.submit(function, *args, **kwargs).result(timeout=300)

    run(_use_caches, tmp_path / "client")
    return run


def _use_caches(folder: Path) -> None:
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
