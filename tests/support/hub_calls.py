"""Calls of the real client that tests of the Hub share, for `on_client` to run; `post` needs no client."""

import http.client
import json
from collections.abc import Iterable
from pathlib import Path
from unittest import mock
from urllib.parse import urlsplit

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError

WRITES, READS, OTHER = "hf_writes", "hf_reads", "hf_other"  # tokens of `users` of tests/support/hub_client.py


def create(repo_id: str = "user/it", token: str = WRITES, **kwargs) -> str:
    """The address of a new repository."""
    return HfApi().create_repo(repo_id, token=token, **kwargs)


def commit(files: dict[str, bytes | None], token: str = WRITES, **kwargs) -> str:
    """A commit that writes files, or deletes those that are None; returns its id."""
    operations = [
        CommitOperationDelete(path) if content is None else CommitOperationAdd(path, content)
        for path, content in files.items()
    ]
    said = {"repo_id": "user/it", "commit_message": "Write", "token": token} | kwargs
    return HfApi().create_commit(operations=operations, **said).oid


def upload(folder: str, token: str = WRITES) -> str:
    """A folder as a commit, by the client's own way for folders; returns its id."""
    return HfApi().upload_folder(folder_path=folder, repo_id="user/it", token=token, commit_message="All").oid


def tag(name: str, revision: str | None = None, token: str = WRITES, **kwargs) -> None:
    """A tag at a revision."""
    HfApi().create_tag("user/it", tag=name, revision=revision, token=token, **kwargs)


def read(path: str, revision: str | None = None, token: str | None = None) -> bytes:
    """The bytes of a file."""
    return Path(hf_hub_download("user/it", path, revision=revision, token=token)).read_bytes()


def outcome(name: str, *args, **kwargs):
    """What a function of this file, or a method of HfApi, returns, or the error it ends in: its type and status.

    The client wraps what went wrong with a large file in a RuntimeError; the type is that of the cause.
    """
    import httpx2

    try:
        return (globals().get(name) or getattr(HfApi(), name))(*args, **kwargs)
    except HfHubHTTPError as error:
        return type(error).__name__, error.response.status_code
    except (httpx2.TransportError, RuntimeError) as error:
        return type(error.__cause__ if isinstance(error, RuntimeError) else error).__name__, None


def quickly(name: str, *args, **kwargs):
    """The `outcome` of a call whose retries come at once instead of after seconds."""
    with mock.patch("huggingface_hub.utils._http.time"), mock.patch("huggingface_hub.file_download.time"):
        return outcome(name, *args, **kwargs)


def post(url: str, lines: Iterable[dict], token: str = WRITES) -> int:
    """The status of a POST of JSON lines, which the client itself might not make."""
    place = urlsplit(url)
    connection = http.client.HTTPConnection(place.netloc, timeout=60)
    body = b"".join(json.dumps(line).encode() + b"\n" for line in lines)
    try:
        connection.request("POST", place.path, body, {"Authorization": f"Bearer {token}"})
        return connection.getresponse().status
    finally:
        connection.close()
