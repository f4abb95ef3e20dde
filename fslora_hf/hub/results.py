"""Results of evaluations on the Hub: read from data sets of results and from models' rounds."""

import json
import re
import time
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import RepositoryNotFoundError
from huggingface_hub.hf_api import RepoFile

from ..common.foreign_text import foreign_names, foreign_text
from ..reports.entries import Entry, parse_entry, read_results
from ..storage.result_files import RESULTS
from .errors import LONGEST_ANSWER, HubError, check_token, scrub
from .fetch import RESULTS_FOLDER, check_name
from .remote import within

SCHEME = "hf://"
LARGEST = 50 * 10**6  # bytes of one file
_ENDINGS = (".json", ".jsonl")
_ADDRESS = re.compile(r"hf://(?P<kind>datasets/)?(?P<repo>[^/@]+/[^/@]+)(?:@(?P<revision>[^@]+))?")


def read_all(paths: Iterable[str | Path]) -> list[Entry]:
    """Entries of files and folders (see `read_results`), and of addresses `hf://datasets/owner/name[@revision]` and
    `hf://owner/name[@revision]`; an address that is named twice counts once.

    Raises:
        FileNotFoundError, ValueError: a path or an address has no results files, or damaged ones.
    """
    paths = list(paths)
    local = [path for path in paths if not str(path).startswith(SCHEME)]
    addresses = dict.fromkeys(parse_address(str(path)) for path in paths if str(path).startswith(SCHEME))
    entries = read_results(local)
    for repo, revision, repo_type in addresses:
        entries += read_hub_results(repo, revision, repo_type)
    return list({(entry.source, entry.name): entry for entry in entries}.values())


def parse_address(address: str) -> tuple[str, str | None, str]:
    """Repository, revision and type of repository of an `hf://` address.

    Raises:
        ValueError: it is none.
    """
    match = _ADDRESS.fullmatch(address)
    if match is None or match["repo"].startswith("datasets/"):
        raise ValueError(
            f"Expected an address hf://datasets/owner/name or hf://owner/name, with @revision or without, found "
            f"{address!r}: correct it."
        )
    return match["repo"], match["revision"], "dataset" if match["kind"] else "model"


def read_hub_results(
    repo: str, revision: str | None = None, repo_type: str | None = None, token: str | None = None
) -> list[Entry]:
    """The results files of a repository at one commit, with their outcomes where they stand beside them.

    Args:
        repo: owner/name.
        repo_type: `dataset` takes `*.results.json` at any depth, `model` (None) those in its folder `results/`.
        token: None for that of this machine's login.

    Raises:
        FileNotFoundError: there is no results file.
        ValueError: the repository cannot be read, or a file is too large, damaged or at a path that leads out of it.
    """
    repo_type = repo_type or "model"
    source = f"{SCHEME}{'datasets/' if repo_type == 'dataset' else ''}{repo}"
    hub = ResultsRepository(repo, repo_type, token)
    files = hub.files(revision)
    folder = RESULTS_FOLDER if repo_type == "model" else ""
    names = [name for name in files if name.endswith(RESULTS) and name.startswith(folder)]
    if not names:
        raise FileNotFoundError(
            f"Expected results files ({folder}*{RESULTS}) at {source}, found none: push some with "
            "recipes/push_results.py, or name another repository."
        )
    if odd := [name for name in names if not name.isprintable()]:
        raise ValueError(f"Expected printable names of files at {source}, found {foreign_names(odd)}: nothing of it "
                         "was read; name another repository.")  # fmt: skip
    return [_entry(hub, name, f"{source}@{hub.commit[:8]}/{name}") for name in names]


def _entry(hub: "ResultsRepository", name: str, source: str) -> Entry:
    results = hub.text(name)
    parse_entry(results, None, source)  # what is read below is checked here
    outcomes = str(PurePosixPath(name).with_name(json.loads(results)["outcomes"]))
    return parse_entry(results, hub.text(outcomes) if outcomes in hub.sizes else None, source)


def check_size(name: str, size: int) -> None:
    """Raises ValueError for a file that is too large to be a result of an evaluation."""
    if size > LARGEST:
        raise ValueError(
            f"Expected at most {LARGEST / 1e6:,.0f} MB in {name}, found {size / 1e6:,.1f} MB: it is left alone; "
            "evaluate fewer rows at once."
        )


def said(error: Exception, token: str | None) -> str:
    """The first words of an error of the client, on one line and without a token."""
    said = scrub(str(error)[:LONGEST_ANSWER], token)
    return (foreign_text(said) or type(error).__name__).rstrip(".")


class ResultsRepository:
    """A repository whose JSON is read, at the commit that `files` found last.

    Args:
        deadline_s: seconds for all that is asked of the Hub, none of whose writes the client would give up.
    """

    def __init__(self, repo: str, repo_type: str, token: str | None = None, deadline_s: float = 600.0):
        check_token(token)
        self.repo, self.repo_type = repo, repo_type
        self.api = HfApi(token=token)
        self.commit, self.private = "", None
        self.sizes: dict[str, int] = {}
        self._ends = time.monotonic() + deadline_s

    def call(self, method: str, **arguments: Any) -> Any:
        """A call of the client, of this repository and within the deadline."""
        call = partial(getattr(self.api, method), repo_id=self.repo, repo_type=self.repo_type, **arguments)
        return within(call, self._ends - time.monotonic())

    def files(self, revision: str | None = None) -> list[str]:
        """Paths of all files at a revision, in order."""
        info = self._read(revision, "repo_info", revision=revision)
        self.commit, self.private = info.sha, info.private
        listed = self._read(revision, "list_repo_tree", revision=self.commit, recursive=True)
        self.sizes = {each.path: each.size for each in listed if isinstance(each, RepoFile)}
        return sorted(self.sizes)

    def text(self, name: str) -> str:
        """A file's text, of JSON only.

        Raises:
            ValueError: it is of another kind, too large, not UTF-8, or at a path that leads out of the repository.
        """
        try:
            check_name(name, _ENDINGS)
        except ValueError as error:
            raise ValueError(
                f"Expected JSON within {self.repo}, found that {foreign_text(error)}: nothing of it was read; "
                "name another repository."
            ) from error
        check_size(f"{name} of {self.repo}", self.sizes[name])
        path = self._read(self.commit, "hf_hub_download", filename=name, revision=self.commit)
        try:
            return Path(path).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"Expected UTF-8 text in {name} of {self.repo}, found byte {error.start} to be none: evaluate anew."
            ) from error

    def _read(self, asked: str | None, method: str, **arguments: Any) -> Any:
        """What a call that reads the revision asked for returns, a list in place of a generator.

        Raises:
            HubError: of kind "repository" if there is none.
        """
        try:
            found = self.call(method, **arguments)
            return list(found) if isinstance(found, Iterator) else found
        except Exception as caught:  # the client's errors have no common type
            what = said(caught, self.api.token)
            kind = "repository" if isinstance(caught, RepositoryNotFoundError) else "server"
        # Not from the cause, whose text may hold a token.
        named = f"{'data set' if self.repo_type == 'dataset' else 'model'} {self.repo}"
        named += f"@{asked}" if asked else ""
        raise HubError(
            f"Expected the {named} on the Hub, found none that can be read ({what}): correct the "
            "name or the revision, or log in with 'hf auth login'.",
            kind,
        )
