"""The real client writes to the test Hub, in both modes of upload, and plain git agrees with what it wrote."""

import hashlib
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationCopy, HfApi, hf_hub_download

from tests.support.hub_calls import WRITES, commit, create, outcome, post, read, tag, upload
from tests.support.hub_repository import Link, RefMoved

pytest_plugins = ("tests.support.hub_client",)

WEIGHTS = bytes(range(256)) * 40


def git(repository, *arguments: str, cwd: Path | None = None) -> str:
    command = ["git", *(["--git-dir", str(repository.folder)] if cwd is None else []), *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=True).stdout


def asked(hub, part: str) -> list[int | None]:
    """The statuses of the requests with this in their path."""
    return [request.status for request in hub.requests if part in request.path]


# ---- files ----


def test_a_folder_becomes_a_commit_that_is_downloaded_again(hub, on_client, users, upload_mode, tmp_path):
    files = {"README.md": b"# It\n", "adapter.safetensors": WEIGHTS, "deep/\u00e9 b.json": b"{}", "empty.bin": b""}
    for path, content in files.items():
        (tmp_path / "run" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "run" / path).write_bytes(content)
    assert on_client(create) == f"{hub.url}/user/it"
    made = on_client(upload, str(tmp_path / "run"))
    repository = hub.find("user/it")
    assert repository.resolve("main") == made
    assert {path: content for path, content in repository.files().items() if path != ".gitattributes"} == files
    assert on_client(read, "adapter.safetensors", made) == WEIGHTS
    assert asked(hub, "/commit/") == [200]
    assert asked(hub, "/storage/") == ([200] if upload_mode == "lfs" else [])
    assert asked(hub, "/objects/verify") == ([200] if upload_mode == "lfs" else [])
    assert set(asked(hub, "/validate-yaml")) == {200}


def test_a_commit_writes_and_deletes_files_and_folders_at_once(hub, on_client, users, upload_mode):
    repository = hub.create("user/it")
    first = on_client(commit, {"a.safetensors": WEIGHTS, "b.json": b"{}", "c/d.txt": b"d", "c/e/f.txt": b"f"})
    second = on_client(commit, {"b.json": None, "c/": None, "a.safetensors": WEIGHTS[:-1], "c": b"now a file"})
    assert repository.files(first) == {
        "a.safetensors": WEIGHTS,
        "b.json": b"{}",
        "c/d.txt": b"d",
        "c/e/f.txt": b"f",
    }
    assert repository.files() == {"a.safetensors": WEIGHTS[:-1], "c": b"now a file"}
    assert git(repository, "rev-list", "main").split() == [second, first]
    for missing in ("none.txt", "none/", "\u2205.txt"):
        assert on_client(outcome, "commit", {missing: None}) == ("RemoteEntryNotFoundError", 404)
    assert repository.resolve("main") == second


def test_unchanged_files_are_not_sent_again(hub, on_client, users, upload_mode):
    repository = hub.create("user/it")
    files = {"a.safetensors": WEIGHTS, "b.json": b"{}"}
    first = on_client(commit, files)
    assert on_client(commit, files) == first
    second = on_client(commit, files | {"b.json": b"[]"})
    bodies = [request.body for request in hub.requests if "/commit/" in request.path]
    assert [body.count(b"a.safetensors") for body in bodies] == [1, 0]
    assert git(repository, "diff", "--name-only", first, second).split() == ["b.json"]
    # Bytes that lie here already under another name are not sent either.
    on_client(commit, {"again.safetensors": WEIGHTS})
    assert repository.files()["again.safetensors"] == WEIGHTS
    assert len(asked(hub, "/storage/")) == (1 if upload_mode == "lfs" else 0)


def copied() -> str:
    return (
        HfApi()
        .create_commit(
            "user/it", [CommitOperationCopy("a.safetensors", "copy.safetensors")], commit_message="Copy", token=WRITES
        )
        .oid
    )


def test_a_file_is_copied_within_the_repository(hub, on_client, users, upload_mode):
    repository = hub.create("user/it")
    on_client(commit, {"a.safetensors": WEIGHTS})
    on_client(copied)
    assert repository.files() == {"a.safetensors": WEIGHTS, "copy.safetensors": WEIGHTS}


def committed_to_dataset(content: bytes) -> tuple[str, str, bytes]:
    operations = [CommitOperationAdd("results/a.bin", content)]
    made = HfApi().create_commit("user/it", operations, commit_message="Add", token=WRITES, repo_type="dataset")
    found = hf_hub_download("user/it", "results/a.bin", repo_type="dataset", revision=made.oid)
    return made.oid, made.commit_url, Path(found).read_bytes()


def test_a_data_set_repository_is_written_alike(hub, on_client, users, upload_mode):
    hub.add("user/it", {"a.json": b"1"})  # a model of the same name
    on_client(create, repo_type="dataset", exist_ok=True)
    oid, url, content = on_client(committed_to_dataset, WEIGHTS)
    assert (url, content) == (f"{hub.url}/datasets/user/it/commit/{oid}", WEIGHTS)
    assert hub.find("user/it", "dataset").resolve("main") == oid
    assert list(hub.find("user/it").files()) == ["a.json"]


def info_of_files() -> list:
    info = HfApi().model_info("user/it", files_metadata=True)
    tree = {entry.path: entry for entry in HfApi().list_repo_tree("user/it")}
    return [
        (file.rfilename, file.size, file.blob_id, file.lfs and file.lfs.sha256, tree[file.rfilename].lfs)
        for file in info.siblings
    ]


def test_a_large_file_is_a_pointer_in_git(hub, on_client, users):
    hub.upload_mode = "lfs"
    repository = hub.create("user/it")
    large = repository.store(WEIGHTS)
    hub.add("user/it", {"a.safetensors": large, "b.json": b"{}"})
    digest = hashlib.sha256(WEIGHTS).hexdigest()
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{digest}\nsize {len(WEIGHTS)}\n"
    assert git(repository, "show", "main:a.safetensors") == pointer
    (name, size, blob, sha256, in_tree), (*_, none, nothing) = on_client(info_of_files)
    assert (name, size, sha256) == ("a.safetensors", len(WEIGHTS), digest)
    assert (in_tree.sha256, in_tree.size, in_tree.pointer_size) == (digest, len(WEIGHTS), len(pointer))
    assert blob == git(repository, "rev-parse", "main:a.safetensors").strip()
    assert (none, nothing) == (None, None)


def test_plain_git_clones_and_checks_what_the_client_wrote(hub, on_client, users, upload_mode, tmp_path):
    on_client(create)
    written = [{"n.json": b"%d" % n, "w.safetensors": WEIGHTS[n:]} for n in range(2)]
    commits = [on_client(commit, files, commit_message=f"Number {n}") for n, files in enumerate(written)]
    on_client(tag, "v1", commits[0], tag_message="Said")
    repository = hub.find("user/it")
    git(repository, "fsck", "--strict", "--full")
    git(repository, "clone", "--quiet", str(repository.folder), str(tmp_path / "clone"), cwd=tmp_path)
    log = git(repository, "log", "--reverse", "--format=%H|%an|%s", cwd=tmp_path / "clone").splitlines()
    assert log[1:] == [f"{commit}|user|Number {n}" for n, commit in enumerate(commits)]
    assert log[0].endswith("|initial commit")
    git(repository, "checkout", "--quiet", "v1", cwd=tmp_path / "clone")
    assert (tmp_path / "clone" / "n.json").read_bytes() == b"0"
    weights = repository.store(WEIGHTS).pointer if upload_mode == "lfs" else WEIGHTS
    assert (tmp_path / "clone" / "w.safetensors").read_bytes() == weights
    assert sorted(repository.refs()) == ["refs/heads/main", "refs/tags/v1"]
    assert repository.refs()["refs/tags/v1"] == commits[0]


@pytest.mark.parametrize(
    "line",
    [
        {"key": "file", "value": {"path": "../out", "content": ""}},
        {"key": "file", "value": {"path": "a/.git/hooks/x", "content": ""}},
        {"key": "lfsFile", "value": {"path": "a.bin", "algo": "sha256", "oid": "0" * 64, "size": 3}},
        {"key": "unknown", "value": {"path": "a"}},
    ],
)
def test_a_commit_that_cannot_be_is_refused(hub, users, line):
    hub.create("user/it")
    header = {"key": "header", "value": {"summary": "Mine"}}
    assert post(f"{hub.url}/api/models/user/it/commit/main", [header, line]) == 400
    assert hub.find("user/it").refs() == {}


# ---- parents, branches, tags ----


def test_a_commit_on_a_head_that_moved_is_refused(hub, on_client, users, upload_mode):
    hub.create("user/it")
    first = on_client(commit, {"a.json": b"1"})
    second = on_client(commit, {"a.json": b"2"}, parent_commit=first)
    assert on_client(outcome, "commit", {"a.json": b"3"}, parent_commit=first) == ("HfHubHTTPError", 412)
    assert hub.find("user/it").resolve("main") == second
    third = on_client(commit, {"a.json": b"3"})  # without a parent: on whatever the head is
    assert git(hub.find("user/it"), "rev-parse", f"{third}^").strip() == second


@pytest.mark.parametrize("with_parent", [True, False])
def test_of_commits_at_once_one_or_all_land(hub, users, with_parent):
    head = hub.add("user/it", {"a.json": b"1"})
    header = {"summary": "Mine"} | ({"parentCommit": head} if with_parent else {})

    def send(n: int) -> int:
        file = {"path": f"{n}.json", "content": "MQ=="}
        lines = [{"key": "header", "value": header}, {"key": "file", "value": file}]
        return post(f"{hub.url}/api/models/user/it/commit/main", lines)

    with ThreadPoolExecutor(4) as pool:
        statuses = sorted(pool.map(send, range(4)))
    assert statuses == ([200, 412, 412, 412] if with_parent else [200] * 4)
    assert len(git(hub.find("user/it"), "rev-list", "main").split()) == 1 + statuses.count(200)
    assert len(hub.find("user/it").files()) == 1 + statuses.count(200)


def test_branches_and_tags_are_made_once_and_deleted(hub, on_client, users):
    first = hub.add("user/it", {"a.json": b"1"})
    second = hub.add("user/it", {"a.json": b"2"})
    said = {"repo_id": "user/it", "token": WRITES}
    on_client(tag, "rounds/0010", first)
    assert on_client(outcome, "tag", "rounds/0010", second) == ("HfHubHTTPError", 409)
    on_client(tag, "rounds/0010", second, exist_ok=True)
    on_client(outcome, "create_branch", branch="runs/b", revision=first, **said)
    assert on_client(outcome, "create_branch", branch="runs/b", **said) == ("HfHubHTTPError", 409)
    third = on_client(commit, {"a.json": b"3"}, revision="runs/b", parent_commit=first)
    expected = {"refs/heads/main": second, "refs/heads/runs/b": third, "refs/tags/rounds/0010": first}
    assert hub.find("user/it").refs() == expected
    assert on_client(outcome, "tag", "v", "0" * 40) == ("RevisionNotFoundError", 404)
    assert on_client(outcome, "commit", {"a.json": b"4"}, create_pr=True) == ("BadRequestError", 400)
    assert on_client(outcome, "tag", "a..b") == ("BadRequestError", 400)
    assert on_client(outcome, "commit", {"a.json": b"4"}, revision="none") == ("RevisionNotFoundError", 404)
    assert on_client(outcome, "commit", {"a.json": b"4"}, revision="rounds/0010") == ("BadRequestError", 400)
    on_client(outcome, "delete_tag", tag="rounds/0010", **said)
    on_client(outcome, "delete_branch", branch="runs/b", **said)
    assert on_client(outcome, "delete_branch", branch="main", **said) == ("HfHubHTTPError", 403)
    assert on_client(outcome, "delete_tag", tag="rounds/0010", **said) == ("RevisionNotFoundError", 404)
    assert hub.find("user/it").refs() == {"refs/heads/main": second}


def test_a_branch_that_plain_git_moved_meanwhile_is_not_overwritten(hub, users, monkeypatch):
    first, repository = hub.add("user/it", {"a": b"1"}), hub.find("user/it")
    second = hub.add("user/it", {"a": b"2"})
    monkeypatch.setattr(repository, "refs", lambda: {"refs/heads/main": first})  # as read before the other's push
    header = {"key": "header", "value": {"summary": "Mine", "parentCommit": first}}
    assert post(f"{hub.url}/api/models/user/it/commit/main", [header]) == 412
    with pytest.raises(RefMoved):
        hub.add("user/it", {"a": b"3"})
    assert git(repository, "for-each-ref", "--format=%(refname) %(objectname)").split() == ["refs/heads/main", second]


def test_a_link_is_in_the_tree_as_git_has_it(hub):
    hub.add("user/it", {"link": Link("/etc/passwd")})
    assert git(hub.find("user/it"), "ls-tree", "main").startswith("120000 blob")
