"""What clients read from the test Hub: infos, listings, histories and files."""

import re
from typing import TYPE_CHECKING
from urllib.parse import urlencode

from tests.support.hub_messages import Answer, NotFound, Request
from tests.support.hub_repository import Repository

if TYPE_CHECKING:
    from tests.support.hub_server import HubServer


def info(hub: "HubServer", request: Request, repository: Repository, repo_id: str, revision: str | None) -> Answer:
    """The commit of a revision and its files."""
    commit = _commit(repository, revision)
    files = [entry for entry in repository.entries(commit, recursive=True) if entry["type"] == "file"]
    siblings = [{"rfilename": file["path"]} for file in files]
    if "blobs" in request.query:
        for sibling, file in zip(siblings, files, strict=True):
            sibling |= {"size": file["size"], "blobId": file["oid"]}
            if "lfs" in file:
                sibling["lfs"] = file["lfs"] | {"sha256": file["lfs"]["oid"]}
    private = repository.private
    return Answer({"id": repo_id, "sha": commit, "private": private, "tags": [], "siblings": siblings})


def refs(hub: "HubServer", request: Request, repository: Repository, repo_id: str) -> Answer:
    """Branches and tags."""
    listed = {"branches": [], "tags": [], "converts": [], "pullRequests": []}
    for ref, commit in repository.refs().items():
        kind, name = ("tags" if ref.startswith("refs/tags/") else "branches"), ref.split("/", 2)[2]
        listed[kind].append({"name": name, "ref": ref, "targetCommit": commit})
    return Answer(listed)


def tree(
    hub: "HubServer", request: Request, repository: Repository, repo_id: str, revision: str, path: str | None
) -> Answer:
    """A folder, flat or deep."""
    commit = _commit(repository, revision)
    entries = repository.entries(commit, [f"{path}/"] if path else [], request.query.get("recursive") == "true")
    entries = [entry for entry in entries if not path or entry["path"].startswith(f"{path}/")]
    if path and not entries:
        raise NotFound("EntryNotFound", commit)
    page = _page(hub, request, entries)
    page.body = _expanded(repository, commit, page.body, request.query.get("expand"))
    return page


def paths_info(hub: "HubServer", request: Request, repository: Repository, repo_id: str, revision: str) -> Answer:
    """The named files and folders, as far as they are there."""
    commit, form = _commit(repository, revision), request.form()
    paths = [path for path in form.get("paths", []) if path]
    entries = repository.entries(commit, paths) if paths else []
    return Answer(_expanded(repository, commit, entries, form.get("expand", [None])[-1]))


def commits(hub: "HubServer", request: Request, repository: Repository, repo_id: str, revision: str) -> Answer:
    """The history, latest first."""
    return _page(hub, request, repository.log(_commit(repository, revision)))


def file(hub: "HubServer", request: Request, repository: Repository, repo_id: str, revision: str, path: str) -> Answer:
    """The bytes of a file, or a part of them."""
    commit = _commit(repository, revision)
    found = [entry for entry in repository.entries(commit, [path]) if entry["type"] == "file"]
    if not found:
        raise NotFound("EntryNotFound", commit)
    etag = found[0].get("lfs", found[0])["oid"]
    headers = {"X-Repo-Commit": commit, "ETag": f'"{etag}"', "Accept-Ranges": "bytes"}
    if "lfs" in found[0]:
        headers |= {"X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(found[0]["size"])}
    content = repository.read(found[0]["oid"])
    asked = re.fullmatch(r"bytes=(\d*)-(\d*)", request.headers.get("Range", ""))
    if asked is None or not any(asked.groups()):
        return Answer(content, 200, headers)
    first, last = asked.groups()
    start = int(first) if first else max(0, len(content) - int(last))
    stop = min(len(content), int(last) + 1) if first and last else len(content)
    if start >= stop:
        return Answer(b"", 416, headers | {"Content-Range": f"bytes */{len(content)}"})
    return Answer(content[start:stop], 206, headers | {"Content-Range": f"bytes {start}-{stop - 1}/{len(content)}"})


def _page(hub: "HubServer", request: Request, items: list) -> Answer:
    start = int(request.query.get("cursor", 0))
    stop = start + hub.page_size
    more = f"{hub.url}{request.path}?{urlencode(request.query | {'cursor': stop})}"
    return Answer(items[start:stop], headers={"Link": f'<{more}>; rel="next"'} if stop < len(items) else {})


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

# As in `hub_writes.ROUTES`.
ROUTES = [
    (("GET",), _API + "/refs", refs, "read"),
    (("GET",), _API + f"/tree{_REVISION}(?:/(?P<path>.+))?", tree, "read"),
    (("POST",), _API + f"/paths-info{_REVISION}", paths_info, "read"),
    (("GET",), _API + f"/commits{_REVISION}", commits, "read"),
    (("GET",), _API + f"(?:/revision{_REVISION})?", info, "read"),
    (
        ("GET", "HEAD"),
        f"/(?:(?P<kind>datasets)/)?(?P<repo>[^/]+/[^/]+)/resolve{_REVISION}/(?P<path>.+)",
        file,
        "read",
    ),
]
