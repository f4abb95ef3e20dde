"""A Hub on 127.0.0.1: the part of the Hugging Face Hub's HTTP API that clients read model and data set files with.

    with HubServer() as hub:
        commit = hub.add("user/adapter", {"README.md": b"..."}, tag="round-0010")
        ...  # start a client with HF_ENDPOINT=hub.url in its environment, where it is read at import

A request is answered in three steps that tests of failures can come between: it is logged, a handler of `ROUTES`
executes it and returns an `Answer`, the answer is sent.
"""

import json
import re
import tempfile
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlencode, urlsplit

from tests.hub_repository import Repository


@dataclass
class Answer:
    """What is sent back; a body that is no bytes is sent as JSON."""

    body: object = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class Request:
    """One request as it came, and the status it was answered with (None until then)."""

    method: str
    target: str  # path and query, percent-encoded
    headers: Mapping[str, str]
    body: bytes
    status: int | None = None

    @property
    def path(self) -> str:
        """The path, still percent-encoded: a slash within a revision must not split it."""
        return urlsplit(self.target).path

    @property
    def query(self) -> dict[str, str]:
        """The last value of each parameter."""
        return {name: values[-1] for name, values in parse_qs(urlsplit(self.target).query).items()}

    def form(self) -> dict[str, list[str]]:
        """The values of each field of a form."""
        return parse_qs(self.body.decode(), keep_blank_values=True)


class NotFound(Exception):
    """A 404 with the code by which the client tells what is missing."""

    def __init__(self, code: str, commit: str | None = None):
        super().__init__(code)
        headers = {"X-Error-Code": code, "X-Error-Message": code} | ({"X-Repo-Commit": commit} if commit else {})
        self.answer = Answer({"error": code}, 404, headers)


class HubServer:
    """The Hub: `url` for HF_ENDPOINT, `add` to fill it, `requests` to see what was asked.

    Args:
        page_size: entries of a folder or history that one answer lists; the client asks for the next page.
    """

    def __init__(self, page_size: int = 1000):
        self.page_size = page_size
        self.requests: list[Request] = []
        self._repositories: dict[tuple[str, str], Repository] = {}
        self._lock = threading.Lock()
        self._folder = tempfile.TemporaryDirectory(prefix="hub-")
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._server.daemon_threads = True  # a client may keep its connection open
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "HubServer":
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
        self._folder.cleanup()

    def add(
        self,
        repo_id: str,
        files: Mapping[str, bytes | None],
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

    def create(self, repo_id: str, repo_type: str = "model") -> Repository:
        """The repository, made empty if there is none."""
        with self._lock:
            if (repo_type, repo_id) not in self._repositories:
                folder = tempfile.mkdtemp(suffix=".git", dir=self._folder.name)
                self._repositories[repo_type, repo_id] = Repository(Path(folder))
            return self._repositories[repo_type, repo_id]

    def clear(self) -> None:
        """Forget all repositories and requests."""
        with self._lock:
            self._repositories.clear()
            self.requests.clear()

    def answer(self, request: Request) -> Answer:
        """Execute a request."""
        for methods, pattern, handle in ROUTES:
            match = re.fullmatch(pattern, request.path)
            if match and request.method in methods:
                parts = {name: None if text is None else unquote(text) for name, text in match.groupdict().items()}
                repo_type, repo_id = (parts.pop("kind") or "models")[:-1], parts.pop("repo")
                try:
                    repository = self._repositories.get((repo_type, repo_id))
                    if repository is None:
                        raise NotFound("RepoNotFound")
                    with repository.lock:
                        return handle(self, request, repository, repo_id=repo_id, **parts)
                except NotFound as error:
                    return error.answer
        return Answer({"error": f"no {request.method} {request.path} here"}, 404)

    # ---- what is read: each takes the request, the repository and the parts of the path ----

    def _info(self, request: Request, repository: Repository, repo_id: str, revision: str | None) -> Answer:
        commit = _commit(repository, revision)
        files = [entry for entry in repository.entries(commit, recursive=True) if entry["type"] == "file"]
        sizes = "blobs" in request.query
        siblings = [
            {"rfilename": file["path"]} | ({"size": file["size"], "blobId": file["oid"]} if sizes else {})
            for file in files
        ]
        return Answer({"id": repo_id, "sha": commit, "private": False, "tags": [], "siblings": siblings})

    def _refs(self, request: Request, repository: Repository, repo_id: str) -> Answer:
        listed = {"branches": [], "tags": [], "converts": [], "pullRequests": []}
        for ref, commit in repository.refs().items():
            kind, name = ("tags" if ref.startswith("refs/tags/") else "branches"), ref.split("/", 2)[2]
            listed[kind].append({"name": name, "ref": ref, "targetCommit": commit})
        return Answer(listed)

    def _tree(self, request: Request, repository: Repository, repo_id: str, revision: str, path: str | None) -> Answer:
        commit = _commit(repository, revision)
        entries = repository.entries(commit, [f"{path}/"] if path else [], request.query.get("recursive") == "true")
        entries = [entry for entry in entries if not path or entry["path"].startswith(f"{path}/")]
        if path and not entries:
            raise NotFound("EntryNotFound", commit)
        page = self._page(request, entries)
        page.body = self._expanded(repository, commit, page.body, request.query.get("expand"))
        return page

    def _paths_info(self, request: Request, repository: Repository, repo_id: str, revision: str) -> Answer:
        commit, form = _commit(repository, revision), request.form()
        paths = [path for path in form.get("paths", []) if path]
        entries = repository.entries(commit, paths) if paths else []
        return Answer(self._expanded(repository, commit, entries, form.get("expand", [None])[-1]))

    def _commits(self, request: Request, repository: Repository, repo_id: str, revision: str) -> Answer:
        return self._page(request, repository.log(_commit(repository, revision)))

    def _file(self, request: Request, repository: Repository, repo_id: str, revision: str, path: str) -> Answer:
        commit = _commit(repository, revision)
        found = [entry for entry in repository.entries(commit, [path]) if entry["type"] == "file"]
        if not found:
            raise NotFound("EntryNotFound", commit)
        headers = {"X-Repo-Commit": commit, "ETag": f'"{found[0]["oid"]}"', "Accept-Ranges": "bytes"}
        content = repository.read(found[0]["oid"])
        asked = re.fullmatch(r"bytes=(\d*)-(\d*)", request.headers.get("Range", ""))
        if asked is None or not any(asked.groups()):
            return Answer(content, 200, headers)
        first, last = asked.groups()
        start = int(first) if first else max(0, len(content) - int(last))
        stop = min(len(content), int(last) + 1) if first and last else len(content)
        if start >= stop:
            return Answer(b"", 416, headers | {"Content-Range": f"bytes */{len(content)}"})
        return Answer(
            content[start:stop], 206, headers | {"Content-Range": f"bytes {start}-{stop - 1}/{len(content)}"}
        )

    def _page(self, request: Request, items: list) -> Answer:
        start = int(request.query.get("cursor", 0))
        stop = start + self.page_size
        more = f"{self.url}{request.path}?{urlencode(request.query | {'cursor': stop})}"
        return Answer(items[start:stop], headers={"Link": f'<{more}>; rel="next"'} if stop < len(items) else {})

    @staticmethod
    def _expanded(repository: Repository, commit: str, entries: list[dict], expand: str | None) -> list[dict]:
        """With the last commit of each entry, if asked for."""
        if expand != "true":
            return entries
        latest = [repository.log(commit, entry["path"])[0] for entry in entries]
        keys = ("id", "title", "date")
        return [e | {"lastCommit": {key: c[key] for key in keys}} for e, c in zip(entries, latest, strict=True)]


def _commit(repository: Repository, revision: str | None) -> str:
    commit = repository.resolve("main" if revision is None else revision)
    if commit is None:
        raise NotFound("RevisionNotFound")
    return commit


_API = r"/api/(?P<kind>models|datasets)/(?P<repo>[^/]+/[^/]+)"
_REVISION = r"/(?P<revision>[^/]+)"

# Methods, pattern of the percent-encoded path, handler. Each named part reaches the handler unquoted.
ROUTES = [
    (("GET",), _API + "/refs", HubServer._refs),
    (("GET",), _API + f"/tree{_REVISION}(?:/(?P<path>.+))?", HubServer._tree),
    (("POST",), _API + f"/paths-info{_REVISION}", HubServer._paths_info),
    (("GET",), _API + f"/commits{_REVISION}", HubServer._commits),
    (("GET",), _API + f"(?:/revision{_REVISION})?", HubServer._info),
    (
        ("GET", "HEAD"),
        f"/(?:(?P<kind>datasets)/)?(?P<repo>[^/]+/[^/]+)/resolve{_REVISION}/(?P<path>.+)",
        HubServer._file,
    ),
]


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else each answer waits 40 ms for the acknowledgement of the one before

    def _exchange(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        request = Request(self.command, self.path, self.headers, body)
        self.hub.requests.append(request)
        answer = self.hub.answer(request)
        request.status = answer.status
        self._send(answer)

    def _send(self, answer: Answer) -> None:
        is_json = not isinstance(answer.body, bytes)
        content = json.dumps(answer.body).encode() if is_json else answer.body
        kind = "application/json" if is_json else "application/octet-stream"
        self.send_response(answer.status)
        for name, value in (answer.headers | {"Content-Type": kind, "Content-Length": str(len(content))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _exchange

    def log_message(self, format: str, *args) -> None:
        """The request log says it all."""
