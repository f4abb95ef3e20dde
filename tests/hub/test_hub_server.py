"""The test Hub answers the real client as the Hub would."""

import hashlib
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from huggingface_hub import HfApi, HfFileSystem, hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError

from tests.support.hub_repository import RefMoved
from tests.support.hub_server import HubServer

pytest_plugins = ("tests.support.hub_client",)
pytestmark = pytest.mark.skipif(shutil.which("git") is None, reason="the test Hub keeps its repositories in git")

FILES = {
    "README.md": b"# Adapter\n",
    "adapter_config.json": b'{"r": 4}',
    "adapter_model.safetensors": bytes(range(256)) * 40,
    "notes/empty file.txt": b"",
    "notes/deep/h\u00e9.txt": b"deep",
}


def downloaded(repo_id: str, revision: str | None = None) -> tuple[str, dict[str, bytes]]:
    """The name of a snapshot's folder, which is the commit, and the files in it."""
    folder = Path(snapshot_download(repo_id, revision=revision))
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return folder.name, files


def test_a_snapshot_is_that_of_the_branch_the_tag_or_the_commit(hub, on_client):
    first = hub.add("user/adapter", FILES, tag="round-0010")
    changed = {"adapter_model.safetensors": b"later", "README.md": None}
    second = hub.add("user/adapter", changed, message="Round 20", tag="rounds/0020")
    later = {path: content for path, content in (FILES | changed).items() if content is not None}
    assert on_client(downloaded, "user/adapter", "round-0010") == (first, FILES)
    assert on_client(downloaded, "user/adapter", first) == (first, FILES)
    # A slash within the name travels percent-encoded.
    assert on_client(downloaded, "user/adapter", "rounds/0020") == (second, later)
    assert on_client(downloaded, "user/adapter") == (second, later)


def test_a_program_with_the_environment_of_a_client_talks_to_the_test_hub(hub, client_environment, upload_mode):
    commit = hub.add("user/it", {"n": b"1"})
    lines = "import huggingface_hub as h; print(h.HfApi().model_info('user/it').sha, h.constants.HF_HUB_DISABLE_XET)"
    command = [sys.executable, "-c", lines]
    printed = subprocess.run(command, env=client_environment, capture_output=True, text=True, check=True).stdout
    assert printed.split() == [commit, str(upload_mode == "lfs")]


def described(repo_id: str, revision: str, repo_type: str):
    api = HfApi()
    info = api.repo_info(repo_id, revision=revision, repo_type=repo_type, files_metadata=True)
    siblings = [(file.rfilename, file.size, file.blob_id) for file in info.siblings]
    refs = api.list_repo_refs(repo_id, repo_type=repo_type)
    named = {ref.ref: ref.target_commit for ref in refs.branches + refs.tags}
    commits = [(c.commit_id, c.title, c.message) for c in api.list_repo_commits(repo_id, repo_type=repo_type)]
    return info.id, info.sha, siblings, named, commits


@pytest.mark.parametrize("repo_type", ["model", "dataset"])
def test_what_a_repository_is_and_was(hub, on_client, repo_type):
    first = hub.add("user/it", FILES, repo_type=repo_type, message="First", tag="v1")
    later = [hub.add("user/it", {"n": b"%d" % n}, repo_type, f"Number {n}\n\nWhy.") for n in range(4)]
    name, sha, siblings, refs, commits = on_client(described, "user/it", "v1", repo_type)
    assert (name, sha) == ("user/it", first)
    blobs = {path: hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest() for path, data in FILES.items()}
    assert sorted(siblings) == sorted((path, len(data), blobs[path]) for path, data in FILES.items())
    assert refs == {"refs/heads/main": later[-1], "refs/tags/v1": first}
    # Five commits come in two pages.
    numbered = [(later[n], f"Number {n}", "Why.") for n in (3, 2, 1, 0)]
    assert commits == [*numbered, (first, "First", "")]
    assert len([request for request in hub.requests if "/commits/" in request.path]) == 2


def listed(repo_id: str, path: str | None, recursive: bool, expand: bool):
    entries = HfApi().list_repo_tree(repo_id, path, recursive=recursive, expand=expand)
    return [(e.path, getattr(e, "size", None), e.last_commit and e.last_commit.title) for e in entries]


def test_folders_are_listed_flat_or_deep_in_pages_with_their_last_commit(hub, on_client):
    hub.add("user/it", FILES, message="First")
    hub.add("user/it", {"notes/empty file.txt": b"no more"}, message="Second")
    top = {"README.md": 10, "adapter_config.json": 8, "adapter_model.safetensors": 10240, "notes": None}
    notes = {"notes/deep": None, "notes/empty file.txt": 7}
    deep = {"notes/deep/h\u00e9.txt": 4}
    flat = on_client(listed, "user/it", None, False, False)
    assert flat == [(path, size, None) for path, size in top.items()]
    assert len([request for request in hub.requests if "/tree/" in request.path]) == 2
    assert dict(entry[:2] for entry in on_client(listed, "user/it", None, True, False)) == top | notes | deep
    assert on_client(listed, "user/it", "notes", False, True) == [
        ("notes/deep", None, "First"),
        ("notes/empty file.txt", 7, "Second"),
    ]
    assert dict(entry[:2] for entry in on_client(listed, "user/it", "notes", True, False)) == notes | deep


def paths_of(repo_id: str, paths: list[str]):
    return [(info.path, type(info).__name__) for info in HfApi().get_paths_info(repo_id, paths, repo_type="dataset")]


def read_part(path: str, start: int, length: int) -> bytes:
    with HfFileSystem().open(path, "rb", block_size=16) as file:
        file.seek(start)
        return file.read(length)


def test_paths_and_parts_of_files(hub, on_client):
    hub.add("user/rows", FILES, repo_type="dataset")
    paths = ["notes", "none.txt", "adapter_config.json", "READ"]
    assert sorted(on_client(paths_of, "user/rows", paths)) == [
        ("adapter_config.json", "RepoFile"),
        ("notes", "RepoFolder"),
    ]
    whole = FILES["adapter_model.safetensors"]
    assert on_client(read_part, "datasets/user/rows/adapter_model.safetensors", 1000, 300) == whole[1000:1300]
    assert [request.status for request in hub.requests if "Range" in request.headers] == [206]


def raised(call: str, *args, **kwargs) -> str:
    """The type of the error that a call of the client ends in."""
    calls = {
        "download": hf_hub_download,
        "info": HfApi().model_info,
        "tree": lambda *a, **k: list(HfApi().list_repo_tree(*a, **k)),
    }
    missing = (EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError)
    with pytest.raises(missing) as caught:
        calls[call](*args, **kwargs)
    return caught.type.__name__


@pytest.mark.parametrize(
    ("call", "args", "error"),
    [
        ("download", ("user/it", "none.txt"), "RemoteEntryNotFoundError"),
        ("download", ("user/it", "notes"), "RemoteEntryNotFoundError"),
        ("download", ("user/none", "README.md"), "RepositoryNotFoundError"),
        ("info", ("user/none",), "RepositoryNotFoundError"),
        ("info", ("user/it", "v9"), "RevisionNotFoundError"),
        ("info", ("user/it", "0" * 40), "RevisionNotFoundError"),
        ("tree", ("user/it", "nowhere"), "RemoteEntryNotFoundError"),
    ],
)
def test_what_is_missing_is_told_apart(hub, on_client, call, args, error):
    hub.add("user/it", FILES)
    hub.add("user/none", FILES, repo_type="dataset")  # another kind of repository with that name
    kwargs = {"revision": args[1]} if call == "info" and len(args) > 1 else {}
    assert on_client(raised, call, *(args[:1] if kwargs else args), **kwargs) == error
    assert hub.requests[-1].status == 404


def fetch(url: str, **headers):
    """Status, body and headers of a GET without any client library."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=10) as answer:
            return answer.status, answer.read(), answer.headers
    except urllib.error.HTTPError as error:
        return error.code, error.read(), error.headers


@pytest.mark.parametrize(
    ("asked", "status", "body", "range_"),
    [
        (None, 200, b"0123456789", None),
        ("bytes=2-4", 206, b"234", "bytes 2-4/10"),
        ("bytes=7-", 206, b"789", "bytes 7-9/10"),
        ("bytes=7-99", 206, b"789", "bytes 7-9/10"),
        ("bytes=-3", 206, b"789", "bytes 7-9/10"),
        ("bytes=10-", 416, b"", "bytes */10"),
    ],
)
def test_headers_and_ranges_of_a_file(asked, status, body, range_):
    with HubServer() as server:
        commit = server.add("user/rows", {"a b.txt": b"0123456789"}, repo_type="dataset")
        found = fetch(f"{server.url}/datasets/user/rows/resolve/main/a%20b.txt", **({"Range": asked} if asked else {}))
        assert found[:2] == (status, body)
        headers = found[2]
        blob = hashlib.sha1(b"blob 10\x000123456789").hexdigest()
        assert (headers["X-Repo-Commit"], headers["ETag"], headers["Content-Range"]) == (commit, f'"{blob}"', range_)


def test_plain_git_reads_the_same_history():
    with HubServer() as server:
        commits = [server.add("user/it", {"n": b"%d" % n}, message=f"Number {n}") for n in range(2)]
        repository = server.create("user/it")
        command = ["git", "--git-dir", str(repository.folder)]
        log = subprocess.run(
            [*command, "log", "--reverse", "--format=%H %s"], capture_output=True, text=True, check=True
        )
        assert log.stdout.splitlines() == [f"{commit} Number {n}" for n, commit in enumerate(commits)]
        subprocess.run([*command, "fsck", "--strict"], check=True, capture_output=True)


def test_a_tag_stays_where_it_is():
    with HubServer() as server:
        server.add("user/it", {"n": b"1"}, tag="v1")
        with pytest.raises(RefMoved):
            server.add("user/it", {"n": b"2"}, tag="v1")
