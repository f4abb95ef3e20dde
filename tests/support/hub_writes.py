"""What clients write to the test Hub: repositories, large files, commits, branches and tags.

Each handler takes the server, the request and the parts of its path; those of a repository hold its lock.
"""

import base64
import hashlib
import json
import re
from typing import TYPE_CHECKING

from tests.support.hub_cards import validate_yaml
from tests.support.hub_messages import Answer, NotFound, Refused, Request
from tests.support.hub_repository import Content, Large, RefMoved, Repository

if TYPE_CHECKING:
    from tests.support.hub_server import HubServer

# Endings of the names of files that are kept beside git in the mode "lfs".
LARGE = ("safetensors", "bin", "pt", "pkl", "parquet", "png")


# ---- repositories ----


def create_repository(hub: "HubServer", request: Request) -> Answer:
    """A repository with the commit that the Hub starts one with."""
    asked = request.json()
    user = hub.user(request)
    repo_id, repo_type = f"{asked.get('organization') or user['name']}/{asked['name']}", asked.get("type") or "model"
    hub.check_may_write(request, repo_id, repo_type)
    if not re.fullmatch(r"[\w.-]+/(?!.*(?:--|\.\.))\w[\w.-]{0,94}\w?", repo_id, re.ASCII) or repo_id.endswith(".git"):
        raise Refused(400, f"Invalid repo name: {repo_id}")
    url = f"{hub.url}/{'' if repo_type == 'model' else repo_type + 's/'}{repo_id}"
    if hub.find(repo_id, repo_type) is not None:
        raise Refused(409, f"You already created this {repo_type} repo", url=url)
    repository = hub.create(repo_id, repo_type, private=asked.get("visibility") == "private")
    attributes = "".join(f"*.{ending} filter=lfs diff=lfs merge=lfs -text\n" for ending in LARGE)
    repository.commit({".gitattributes": attributes.encode()}, "initial commit", author=user["name"])
    return Answer({"url": url, "name": repo_id, "private": repository.private})


def delete_repository(hub: "HubServer", request: Request) -> Answer:
    """The repository and its history are gone."""
    asked = request.json()
    repo_id, repo_type = f"{asked.get('organization') or hub.user(request)['name']}/{asked['name']}", asked.get("type")
    repository = hub.find(repo_id, repo_type or "model")
    if repository is None or not hub.may_see(request, repo_id, repository):
        raise NotFound("RepoNotFound")
    hub.check_may_write(request, repo_id, repo_type or "model")
    hub.remove(repo_id, repo_type or "model")
    return Answer(b"OK")


def whoami(hub: "HubServer", request: Request) -> Answer:
    """Name, organizations and role of the token's user."""
    user = hub.user(request)
    auth = {"type": "access_token", "accessToken": {"displayName": "test", "role": user["role"]}}
    orgs = [{"type": "org", "name": name} for name in user.get("orgs", [])]
    return Answer({"type": "user", "name": user["name"], "fullname": user["name"], "orgs": orgs, "auth": auth})


# ---- files ----


def preupload(hub: "HubServer", request: Request, repository: Repository, repo_id: str, revision: str) -> Answer:
    """For each file: whether it travels in the commit or beside it, and what stands at its path now."""
    head = _head(repository, revision)
    paths = [file["path"] for file in request.json()["files"]]
    entries = repository.entries(head, paths) if head and paths else []
    present = {entry["path"]: entry.get("lfs", entry)["oid"] for entry in entries if entry["type"] == "file"}
    answers = []
    for path in paths:
        large = hub.upload_mode == "lfs" and path.rpartition(".")[2] in LARGE
        answer = {"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
        answers.append(answer | ({"oid": present[path]} if path in present else {}))
    return Answer({"files": answers})


def lfs_batch(hub: "HubServer", request: Request, repository: Repository, repo_id: str) -> Answer:
    """Where the bytes of each large file go; nowhere, if they are here."""
    objects, here = [], hub.url + request.path.removesuffix("/objects/batch")
    for asked in request.json()["objects"]:
        item = {"oid": asked["oid"], "size": asked["size"]}
        if not repository.large_file(asked["oid"]).exists():
            place, verify = f"{here}/storage/{asked['oid']}?key={hub.upload_key}", f"{here}/objects/verify"
            item["actions"] = {"upload": {"href": place}, "verify": {"href": verify}}
        objects.append(item)
    return Answer({"transfer": "basic", "objects": objects})


def lfs_put(hub: "HubServer", request: Request, repository: Repository, repo_id: str, oid: str) -> Answer:
    """Keep the bytes of a large file. Who holds the address may write: it carries the key, not the token."""
    if request.query.get("key") != hub.upload_key:
        raise Refused(403, "the signature does not match")
    if hashlib.sha256(request.body).hexdigest() != oid:
        raise Refused(400, "the content does not match its checksum")
    repository.store(request.body)
    return Answer(headers={"ETag": f'"{oid}"'})


def lfs_verify(hub: "HubServer", request: Request, repository: Repository, repo_id: str) -> Answer:
    """Whether a large file is here, whole."""
    asked = request.json()
    _large(repository, asked["oid"], asked["size"])
    return Answer({"success": True})


def _large(repository: Repository, oid: str, size: int | None) -> Large:
    path = repository.large_file(oid)
    found = path.stat().st_size if path.exists() else None
    if found is None or size not in (None, found):
        raise Refused(400, f"an LFS pointer points to a file that is not here: {oid}")
    return Large(oid, found)


# ---- commits ----


def commit(hub: "HubServer", request: Request, repository: Repository, repo_id: str, revision: str) -> Answer:
    """One commit on a branch, if its head is the parent that the client names."""
    if "create_pr" in request.query:
        raise Refused(400, "this Hub has no pull requests")
    head = _head(repository, revision)
    if head is not None and f"refs/heads/{revision}" not in repository.refs():
        raise Refused(400, f"{revision} is no branch")
    header, files = _operations(repository, head, request.body)
    moved = Refused(412, "A commit has happened since. Please refresh and try again.")
    if header.get("parentCommit") not in (None, head):
        raise moved
    message = f"{header['summary']}\n\n{header.get('description', '')}".strip()
    try:
        made = repository.commit(files, message, revision, author=hub.user(request)["name"])
    except RefMoved:  # by plain git, which holds no lock of ours
        raise moved from None
    prefix = "datasets/" if request.path.startswith("/api/datasets/") else ""
    return Answer({"success": True, "commitOid": made, "commitUrl": f"{hub.url}/{prefix}{repo_id}/commit/{made}"})


def _operations(repository: Repository, head: str | None, body: bytes) -> tuple[dict, dict[str, Content | None]]:
    """The header of a commit, and what it makes of each path."""
    try:
        lines = [json.loads(line) for line in body.splitlines() if line.strip()]
        header = next(line["value"] for line in lines if line["key"] == "header")
    except (ValueError, KeyError, StopIteration):
        raise Refused(400, "the commit is no ndjson with a header") from None
    files: dict[str, Content | None] = {}
    for line in lines:
        key, value = line["key"], line["value"]
        if key == "header":
            continue
        path = _checked(value["path"])
        if key == "file":
            files[path] = base64.b64decode(value["content"], validate=True)
        elif key == "lfsFile":
            files[path] = _large(repository, value["oid"], value.get("size"))
        elif key in ("deletedFile", "deletedFolder"):
            _check_there(repository, head, path, key)
            files.setdefault(path, None)
        else:
            raise Refused(400, f"unknown operation {key}")
    return header, files


def _checked(path: str) -> str:
    """A path that stays within the repository, without the slash at its end that names a folder."""
    parts = path.removesuffix("/").split("/")
    if any(part in ("", ".", "..") or part.lower() == ".git" for part in parts) or set(path) & set('"\n'):
        raise Refused(400, f"Invalid path: {path!r}")
    return "/".join(parts)


def _check_there(repository: Repository, head: str | None, path: str, key: str) -> None:
    kind = "file" if key == "deletedFile" else "directory"
    found = repository.entries(head, [path]) if head else []
    if not any(entry["type"] == kind for entry in found):
        raise NotFound("EntryNotFound", head, f"A {kind} with this name doesn't exist: {path}")


def _head(repository: Repository, revision: str) -> str | None:
    """The commit of a revision; None for the `main` of a repository without a commit."""
    head = repository.resolve(revision)
    if head is None and not (revision == "main" and not repository.refs()):
        raise NotFound("RevisionNotFound")
    return head


# ---- branches and tags ----


def create_branch(hub: "HubServer", request: Request, repository: Repository, repo_id: str, branch: str) -> Answer:
    """A branch from a revision, or from `main`."""
    start = _head(repository, request.json().get("startingPoint") or "main")
    if start is None:
        raise NotFound("RevisionNotFound")
    return _made(repository, f"refs/heads/{branch}", lambda: repository.set_ref(f"refs/heads/{branch}", start))


def create_tag(hub: "HubServer", request: Request, repository: Repository, repo_id: str, revision: str) -> Answer:
    """A tag at a revision."""
    asked, at = request.json(), _head(repository, revision)
    if at is None:
        raise NotFound("RevisionNotFound")
    name, message = asked["tag"], asked.get("message")
    return _made(repository, f"refs/tags/{name}", lambda: repository.tag(name, at, message))


def _made(repository: Repository, ref: str, make) -> Answer:
    if not repository.is_name(ref):
        raise Refused(400, f"Invalid name: {ref}")
    try:
        make()
    except RefMoved:
        raise Refused(409, f"Reference {ref} already exists") from None
    return Answer({"ref": ref}, 201)


def delete_branch(hub: "HubServer", request: Request, repository: Repository, repo_id: str, branch: str) -> Answer:
    """The branch is gone, its commits stay; `main` cannot go."""
    if branch == "main":
        raise Refused(403, "Cannot delete the main branch")
    return _deleted(repository, f"refs/heads/{branch}")


def delete_tag(hub: "HubServer", request: Request, repository: Repository, repo_id: str, tag: str) -> Answer:
    """The tag is gone."""
    return _deleted(repository, f"refs/tags/{tag}")


def _deleted(repository: Repository, ref: str) -> Answer:
    if ref not in repository.refs():
        raise NotFound("RevisionNotFound")
    repository.git("update-ref", "-d", ref)
    return Answer({"ref": ref})


_API = r"/api/(?P<kind>models|datasets)/(?P<repo>[^/]+/[^/]+)"
_LFS = r"/(?:(?P<kind>datasets)/)?(?P<repo>[^/]+/[^/]+)\.git/info/lfs"

# Methods, pattern of the percent-encoded path, handler, and what it asks of the token: "read", "write", "key" (the
# address shows a key instead), or None where no repository is named. Each named part reaches the handler unquoted.
ROUTES = [
    (("GET",), "/api/whoami-v2", whoami, None),
    (("POST",), "/api/repos/create", create_repository, None),
    (("DELETE",), "/api/repos/delete", delete_repository, None),
    (("POST",), "/api/validate-yaml", validate_yaml, None),
    (("GET",), _API + "/auth-check", lambda *_, **__: Answer(b"OK"), "read"),
    (("GET",), _API + "/auth-check/write", lambda *_, **__: Answer(b"OK"), "write"),
    (("POST",), _API + "/preupload/(?P<revision>[^/]+)", preupload, "write"),
    (("POST",), _API + "/commit/(?P<revision>[^/]+)", commit, "write"),
    (("POST",), _API + "/branch/(?P<branch>[^/]+)", create_branch, "write"),
    (("DELETE",), _API + "/branch/(?P<branch>[^/]+)", delete_branch, "write"),
    (("POST",), _API + "/tag/(?P<revision>[^/]+)", create_tag, "write"),
    (("DELETE",), _API + "/tag/(?P<tag>[^/]+)", delete_tag, "write"),
    (("POST",), _LFS + "/objects/batch", lfs_batch, "write"),
    (("POST",), _LFS + "/objects/verify", lfs_verify, "write"),
    (("PUT",), _LFS + "/storage/(?P<oid>[0-9a-f]{64})", lfs_put, "key"),
]
