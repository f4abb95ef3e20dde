"""A Hub on 127.0.0.1: the part of the Hugging Face Hub's HTTP API that clients read and write repositories with.

    with HubServer() as hub:
        commit = hub.add("user/adapter", {"README.md": b"..."}, tag="round-0010")
        hub.users["hf_key"] = {"name": "user", "role": "write", "orgs": []}
        hub.fault("commit", drop_answer=True)
        ...  # start a client with HF_ENDPOINT=hub.url in its environment, where it is read at import

A request is answered in three steps, and `fault` comes between any two of them: it is logged, a handler of `ROUTES`
executes it and returns an `Answer`, the answer is sent.
"""

import contextlib
import json
import re
import secrets
import socket
import struct
import tempfile
import threading
import traceback
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

from tests.support import hub_reads, hub_writes
from tests.support.hub_faults import Fault, Faults
from tests.support.hub_messages import Answer, NotFound, Refused, Request
from tests.support.hub_repository import Content, Repository


class HubServer:
    """The Hub: `url` for HF_ENDPOINT, `add` to fill it, `fault` to break it, `requests` to see what was asked.

    `users` maps a token to `{"name": ..., "role": "write" or "read", "orgs": [...]}`. Everyone reads what is not
    private; only the "write" tokens of a namespace's user, or of one whose orgs hold it, write there. `upload_mode`
    is "regular" (all files travel in commits) or "lfs" (those of `hub_writes.LARGE` are kept beside git).

    Args:
        page_size: entries of a folder or history that one answer lists; the client asks for the next page.
    """

    def __init__(self, page_size: int = 1000):
        self.page_size = page_size
        self.requests: list[Request] = []
        self.users: dict[str, dict] = {}
        self.upload_mode = "regular"
        self.upload_key = secrets.token_hex(8)  # in the addresses that large files are sent to
        self.faults = Faults()
        self._repositories: dict[tuple[str, str], Repository] = {}
        self._lock = threading.RLock()
        self._folder = tempfile.TemporaryDirectory(prefix="hub-")
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._server.daemon_threads = True  # a client may keep its connection open
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "HubServer":
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self.faults.clear()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
        self._folder.cleanup()

    def add(
        self,
        repo_id: str,
        files: Mapping[str, Content | None],
        repo_type: str = "model",
        message: str = "Add files",
        tag: str | None = None,
    ) -> str:
        """Commit files to `main` of a repository, which is created if need be; returns the commit id."""
        repository = self.create(repo_id, repo_type)
        with repository.lock:
            commit = repository.commit(files, message)
            if tag is not None:
                repository.tag(tag, commit)
        return commit

    def create(self, repo_id: str, repo_type: str = "model", private: bool = False) -> Repository:
        """The repository, made empty if there is none."""
        with self._lock:
            if (repo_type, repo_id) not in self._repositories:
                folder = tempfile.mkdtemp(suffix=".git", dir=self._folder.name)
                self._repositories[repo_type, repo_id] = Repository(Path(folder), private)
            return self._repositories[repo_type, repo_id]

    def find(self, repo_id: str, repo_type: str = "model") -> Repository | None:
        """The repository, if there is one."""
        return self._repositories.get((repo_type, repo_id))

    def remove(self, repo_id: str, repo_type: str = "model") -> None:
        """Forget a repository."""
        with self._lock:
            del self._repositories[repo_type, repo_id]

    def clear(self) -> None:
        """Forget all repositories, users, faults and requests."""
        with self._lock:
            self._repositories.clear()
            self.users.clear()
            self.requests.clear()
            self.upload_mode = "regular"
        self.faults.clear()

    def fault(self, pattern: str, **what) -> Fault:
        """Order a fault: the arguments are those of `Fault`."""
        return self.faults.add(Fault(pattern, **what))

    def mend(self) -> None:
        """Nothing fails from now on, and what waits goes on."""
        self.faults.clear()

    def release(self) -> None:
        """What waits at this moment goes on."""
        self.faults.release()

    # ---- who may do what ----

    def user(self, request: Request) -> dict:
        """The user whose token the request shows; a 401 if it shows none, or none that is known."""
        if request.token is None:
            raise Refused(401, "Invalid username or password.")
        if request.token not in self.users:
            raise Refused(401, "Invalid credentials in Authorization header")
        return self.users[request.token]

    def may_see(self, request: Request, repo_id: str, repository: Repository) -> bool:
        """Whether the repository is there for whoever asks."""
        if not repository.private:
            return True
        return request.token is not None and _is_of(self.user(request), repo_id)

    def check_may_write(self, request: Request, repo_id: str, repo_type: str) -> None:
        """A 401 or 403 if who asks may not write to a repository of that name."""
        user = self.user(request)
        if user["role"] != "write":
            raise Refused(403, "you must use a write token to write to a repository")
        if not _is_of(user, repo_id):
            namespace = repo_id.split("/")[0]
            raise Refused(403, f'You don\'t have the rights to write a {repo_type} under the namespace "{namespace}"')

    def answer(self, request: Request) -> Answer:
        """Execute a request."""
        try:
            if request.token is not None:
                self.user(request)  # a token that nobody has is refused even where none is needed
            return self._execute(request)
        except Refused as error:
            return error.answer
        except Exception:  # a flaw of this server, told to the test through the client's error
            return Answer({"error": traceback.format_exc()}, 500)

    def _execute(self, request: Request) -> Answer:
        for methods, pattern, handle, access in ROUTES:
            match = re.fullmatch(pattern, request.path)
            if not match or request.method not in methods:
                continue
            parts = {name: None if text is None else unquote(text) for name, text in match.groupdict().items()}
            if access is None:
                with self._lock:
                    return handle(self, request)
            repo_type, repo_id = (parts.pop("kind") or "models")[:-1], parts.pop("repo")
            repository = self.find(repo_id, repo_type)
            if repository is None or (access != "key" and not self.may_see(request, repo_id, repository)):
                raise NotFound("RepoNotFound")
            if access == "write":
                self.check_may_write(request, repo_id, repo_type)
            with repository.lock:
                return handle(self, request, repository, repo_id=repo_id, **parts)
        raise Refused(404, f"no {request.method} {request.path} here")


def _is_of(user: dict, repo_id: str) -> bool:
    return repo_id.split("/")[0] in (user["name"], *user.get("orgs", []))


ROUTES = [*hub_writes.ROUTES, *hub_reads.ROUTES]


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else each answer waits 40 ms for the acknowledgement of the one before

    def handle(self) -> None:
        """Answer all that comes on one connection."""
        with contextlib.suppress(ConnectionError):  # the client is gone, or did not wait
            super().handle()

    def _exchange(self) -> None:
        request = Request(self.command, self.path, self.headers, self._body())
        self.hub.requests.append(request)
        fault = self.hub.faults.of(request) or Fault("")
        if fault.reset:
            self._reset()
            return
        answer = fault.answer or self.hub.answer(request)
        request.status = answer.status
        if fault.drop_answer:
            self.close_connection = True
            return
        self._send(answer, fault.truncate)

    def _body(self) -> bytes:
        """The whole body; a ConnectionError if it ends early: half a commit must not be made."""
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self._read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline().split(b";")[0] or b"0", 16):
            chunks.append(self._read(size))
            self._read(2)
        if self.rfile.readline() != b"\r\n":  # no client sends trailers
            raise ConnectionError("the body ends early")
        return b"".join(chunks)

    def _read(self, size: int) -> bytes:
        content = self.rfile.read(size)
        if len(content) < size:
            raise ConnectionError("the body ends early")
        return content

    def _reset(self) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()  # before the server would end it in order
        self.close_connection = True

    def _send(self, answer: Answer, truncate: bool) -> None:
        is_json = not isinstance(answer.body, bytes)
        content = json.dumps(answer.body).encode() if is_json else answer.body
        kind = "application/json" if is_json else "application/octet-stream"
        self.send_response(answer.status)
        for name, value in (answer.headers | {"Content-Type": kind, "Content-Length": str(len(content))}).items():
            self.send_header(name, value)
        self.end_headers()
        if truncate:
            content, self.close_connection = content[: len(content) // 2], True
        if self.command != "HEAD":
            self.wfile.write(content)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _exchange

    def log_message(self, format: str, *args) -> None:
        """The request log says it all."""
