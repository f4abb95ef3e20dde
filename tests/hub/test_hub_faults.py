"""Each way in which the test Hub fails, as the real client meets it."""

import http.client
import shutil
import socket
import threading
import time
import urllib.error
import urllib.request

import pytest

from tests.support.hub_calls import WRITES, commit, outcome, quickly, read
from tests.support.hub_server import HubServer

pytest_plugins = ("tests.support.hub_client",)
pytestmark = pytest.mark.skipif(shutil.which("git") is None, reason="the test Hub keeps its repositories in git")

LARGE = {"a.safetensors": b"2"}
NDJSON = (
    b'{"key": "header", "value": {"summary": "Late"}}\n{"key": "file", "value": {"path": "a", "content": "Mg=="}}\n'
)


@pytest.fixture
def repository(hub, users):
    """The repository `user/it` with one commit, and users."""
    hub.add("user/it", {"a.json": b"1"})
    return hub.find("user/it")


def asked(hub, part: str) -> list[int | None]:
    return [request.status for request in hub.requests if part in request.path]


@pytest.mark.parametrize("status", [402, 403, 409, 413, 422, 500, 503])
def test_an_error_of_the_commit_is_raised_at_once(hub, on_client, repository, status):
    head = repository.resolve("main")
    fault = hub.fault("commit", status=status)
    assert on_client(outcome, "commit", LARGE) == ("HfHubHTTPError", status)
    assert (fault.hits, repository.resolve("main")) == (1, head)
    on_client(commit, LARGE)
    assert repository.files()["a.safetensors"] == b"2"


@pytest.mark.parametrize("stage", ["preupload", "batch", "storage", "verify"])
def test_an_error_before_the_commit_is_retried(hub, on_client, repository, upload_mode, stage):
    fault = hub.fault(stage, status=503, times=2)
    made = on_client(quickly, "commit", LARGE)
    times = 2 if upload_mode == "lfs" or stage == "preupload" else 0
    assert (fault.hits, asked(hub, f"/{stage}")[:2]) == (times, [503] * times)
    assert (repository.resolve("main"), repository.files()["a.safetensors"]) == (made, b"2")


@pytest.mark.parametrize("stage", ["preupload", "storage"])
def test_a_reset_before_the_commit_is_retried(hub, on_client, repository, upload_mode, stage):
    fault = hub.fault(stage, reset=True, times=2)
    assert on_client(quickly, "commit", LARGE) == repository.resolve("main")
    assert fault.hits == (2 if upload_mode == "lfs" or stage == "preupload" else 0)
    assert repository.files()["a.safetensors"] == b"2"


def test_an_error_that_stays_ends_the_retries(hub, on_client, repository):
    head = repository.resolve("main")
    fault = hub.fault("preupload", status=500, times=None)
    assert on_client(quickly, "commit", LARGE) == ("HfHubHTTPError", 500)
    assert (fault.hits, repository.resolve("main")) == (6, head)
    hub.mend()
    on_client(commit, LARGE)


def test_a_reset_commit_has_not_happened(hub, on_client, repository, upload_mode):
    head = repository.resolve("main")
    hub.fault("commit", reset=True)
    assert on_client(outcome, "commit", LARGE) == ("ReadError", None)
    assert repository.resolve("main") == head
    assert asked(hub, "/commit/") == [None]


@pytest.mark.parametrize(
    ("how", "error"), [("drop_answer", "RemoteProtocolError"), ("truncate", "RemoteProtocolError")]
)
def test_a_commit_whose_answer_is_lost_has_happened(hub, on_client, repository, upload_mode, how, error):
    head = repository.resolve("main")
    hub.fault("commit", **{how: True})
    assert on_client(outcome, "commit", LARGE, parent_commit=head) == (error, None)
    assert repository.files()["a.safetensors"] == b"2"
    # Told apart from a commit that was not made: the same parent is not the head any more.
    assert on_client(outcome, "commit", {"a.safetensors": b"3"}, parent_commit=head) == ("HfHubHTTPError", 412)
    assert len(repository.log("main")) == 2


def test_the_default_upload_commits_twice_if_the_answer_is_lost(hub, on_client, repository, tmp_path):
    (tmp_path / "a.json").write_bytes(b"2")
    hub.fault("commit", drop_answer=True)
    made = on_client(quickly, "upload", str(tmp_path))
    assert [commit["title"] for commit in repository.log(made)] == ["All", "All", "Add files"]


@pytest.mark.parametrize("stage", ["whoami-v2", "repos/create", "tag", "refs"])
def test_what_is_not_retried(hub, on_client, repository, stage):
    calls = {
        "whoami-v2": ("whoami", {}),
        "repos/create": ("create_repo", {"repo_id": "user/new"}),
        "tag": ("create_tag", {"repo_id": "user/it", "tag": "v"}),
        "refs": ("list_repo_refs", {"repo_id": "user/it"}),
    }
    name, said = calls[stage]
    hub.fault(stage, status=503)
    hub.fault(stage, reset=True)
    assert on_client(outcome, name, token=WRITES, **said) == ("HfHubHTTPError", 503)
    assert on_client(outcome, name, token=WRITES, **said) == ("ReadError", None)
    on_client(outcome, name, token=WRITES, **said)
    assert [request.status for request in hub.requests] in ([503, None, 200], [503, None, 201])


def test_a_tag_whose_answer_is_lost_is_there(hub, on_client, repository):
    hub.fault("tag", drop_answer=True)
    assert on_client(outcome, "create_tag", "user/it", tag="v", token=WRITES) == ("RemoteProtocolError", None)
    assert "refs/tags/v" in repository.refs()


def test_a_stalled_commit_waits_until_it_is_released(hub, on_client, repository):
    head = repository.resolve("main")
    fault = hub.fault("commit", stall_s=600)
    answers = []
    thread = threading.Thread(target=lambda: answers.append(on_client(commit, LARGE)))
    thread.start()
    wait_until(lambda: fault.hits)
    # While it waits, all else is answered.
    assert urllib.request.urlopen(f"{hub.url}/api/models/user/it", timeout=60).status == 200
    assert repository.resolve("main") == head
    hub.release()
    thread.join(60)
    assert answers == [repository.resolve("main")] != [head]


def test_a_commit_lands_although_its_client_gave_up(hub, repository):
    head = repository.resolve("main")
    fault = hub.fault("commit", stall_s=600)
    connection = http.client.HTTPConnection(hub.url.removeprefix("http://"), timeout=60)
    connection.request("POST", "/api/models/user/it/commit/main", NDJSON, {"Authorization": f"Bearer {WRITES}"})
    wait_until(lambda: fault.hits)
    connection.close()
    hub.release()
    wait_until(lambda: repository.resolve("main") != head)
    assert repository.log("main")[0]["title"] == "Late"


@pytest.mark.parametrize("chunked", [False, True])
def test_half_a_commit_is_not_made(hub, repository, chunked):
    head, place = repository.resolve("main"), hub.url.removeprefix("http://").split(":")
    whole = NDJSON.index(b"\n") + 1  # the first line alone would be a commit
    body = b"%x\r\n%s\r\n" % (whole, NDJSON[:whole]) if chunked else NDJSON[:whole]
    length = "Transfer-Encoding: chunked" if chunked else f"Content-Length: {len(NDJSON)}"
    lines = ["POST /api/models/user/it/commit/main HTTP/1.1", "Host: hub", f"Authorization: Bearer {WRITES}", length]
    with socket.create_connection((place[0], int(place[1])), timeout=60) as connection:
        connection.sendall("\r\n".join([*lines, "", ""]).encode() + body)
        connection.shutdown(socket.SHUT_WR)
        assert connection.recv(1) == b""  # closed without an answer
    assert repository.resolve("main") == head


def wait_until(true, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.01)


def test_a_truncated_file_is_no_file(hub, on_client, repository):
    hub.add("user/it", {"long.json": b"x" * 1000})
    fault = hub.fault("resolve/main/long.json", method="GET", truncate=True, times=None)
    assert on_client(quickly, "read", "long.json") == ("RemoteProtocolError", None)
    assert fault.hits > 1
    hub.mend()
    assert on_client(read, "long.json") == b"x" * 1000


def status_of(url: str, method: str = "GET") -> int:
    try:
        return urllib.request.urlopen(urllib.request.Request(url, method=method), timeout=60).status
    except urllib.error.HTTPError as error:
        return error.code


def test_which_requests_a_fault_befalls():
    with HubServer() as server:
        server.add("user/it", {"a": b"1"})
        info, refs = f"{server.url}/api/models/user/it", f"{server.url}/api/models/user/it/refs"
        server.fault("ref", status=500, times=None)  # part of a segment is not a segment
        server.fault("refs", status=500, method="POST", times=None)
        server.fault("user/it/refs", status=502, after=1, times=2)
        assert [status_of(refs) for _ in range(5)] == [200, 502, 502, 200, 200]
        server.fault("it|refs", status=503)
        server.fault("refs", status=504, headers={"Retry-After": "1"})
        assert [status_of(info), status_of(refs), status_of(refs)] == [503, 504, 200]


def test_a_forged_answer_is_given_without_a_look():
    with HubServer() as server:
        server.add("user/it", {"a": b"1"})
        server.fault("tree", body=[{"type": "file", "path": "../a", "oid": "0" * 40, "size": 1}])
        answer = urllib.request.urlopen(f"{server.url}/api/models/user/it/tree/main", timeout=60).read()
        assert b'"../a"' in answer
