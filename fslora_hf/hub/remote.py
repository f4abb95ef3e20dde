"""The repository that rounds go to, through the client of the Hub: each call has an end, and one kind of error."""

import logging
import queue
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.utils import build_hf_headers, paginate, validate_repo_id

from ..common.foreign_text import foreign_names, foreign_text
from ..common.settings import kind_of
from .errors import HubError, check_token, translate

logger = logging.getLogger(__name__)

_TAG = re.compile(r"round-(\d{4,})")


@dataclass(frozen=True)
class HubTarget:
    """Where rounds go; names and defaults are those of the Trainer's fields of the Hub.

    Attributes:
        repo_id: "owner/name", or "name" of the token's owner.
        token: None: the one of this machine's login. It is in no text that this package makes.
        private: whether a repository that is created is private; None: the owner's default.
        revision: the branch to commit to.
        endpoint: address of the Hub; None: the client's own.
    """

    repo_id: str
    token: str | None = field(default=None, repr=False)
    private: bool | None = None
    revision: str = "main"
    endpoint: str | None = None


def check_target(target: HubTarget, *, deadline_s: float = 60.0) -> HubTarget | None:
    """Create the repository if need be and see that the token may write to it, as far as that can be known.

    Returns:
        the target with its full name; None, after a warning, if the Hub cannot be reached.

    Raises:
        HubError: the rounds of a run could not be pushed there.
    """
    try:
        remote = Remote(target, deadline_s)
        who = remote.who()
        remote.own(who.name)
        _refuse_owner(remote.target.repo_id, who)
        remote.create()
        try:
            remote.call("auth_check", write=True)
        except HubError as error:  # not every Hub has this check
            if error.kind == "permission":
                raise
        remote.check_private()
        return remote.target
    except HubError as error:
        if error.kind not in ("network", "server"):
            raise
        logger.warning("%s Training goes on.", error)
        return None


@dataclass(frozen=True)
class Owner:
    """Whom a token belongs to, and whether it only reads."""

    name: str
    organizations: tuple[str, ...]
    reads_only: bool

    @classmethod
    def of(cls, answer: Any) -> "Owner":
        """What the Hub answers when it is asked who one is; without what it says in another shape.

        Raises:
            HubError: it does not say a name.
        """
        name = answer.get("name") if isinstance(answer, Mapping) else None
        if not isinstance(name, str) or not name:
            raise HubError(
                f"Expected the Hub to say whom the token belongs to, found an answer of another shape "
                f"({foreign_names(answer) if isinstance(answer, Mapping) else kind_of(answer)}): see that the address "
                "of the Hub (HF_ENDPOINT) is one.",
                "server",
            )
        listed = answer.get("orgs")
        organizations = [each.get("name") for each in listed if isinstance(each, Mapping)] if _is_list(listed) else []
        role = answer
        for key in ("auth", "accessToken", "role"):
            role = role.get(key) if isinstance(role, Mapping) else None
        return cls(name, tuple(each for each in organizations if isinstance(each, str)), role == "read")


def _is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple))


def _refuse_owner(repo_id: str, who: Owner) -> None:
    if who.reads_only:
        raise HubError(
            f"Expected a token that may write to {repo_id}, found one that only reads: make one with write access and "
            "pass it as hub_token.",
            "permission",
        )
    owners = [who.name, *who.organizations]
    told = " or ".join(foreign_text(name, 60) for name in owners[:20])
    if repo_id.split("/")[0].casefold() not in {name.casefold() for name in owners}:
        raise HubError(
            f"Expected a repository of {told}, to whom the token belongs, found {repo_id}: set "
            "hub_model_id to one of theirs, or pass another hub_token.",
            "permission",
        )


@dataclass(frozen=True)
class Commit:
    """A commit of the repository: its id, and its message without the title."""

    commit_id: str
    message: str


class Remote:
    """The target's repository as it was last read; every call ends within the deadline and raises HubError only."""

    def __init__(self, target: HubTarget, deadline_s: float):
        self.target = target
        self.branches: dict[str, str] = {}  # name -> commit id
        self.tags: dict[str, str] = {}
        self._api = HfApi(endpoint=target.endpoint, token=target.token)
        self._ends = time.monotonic() + deadline_s
        self._translated(partial(validate_repo_id, target.repo_id))
        check_token(target.token)

    @property
    def seconds_left(self) -> float:
        return self._ends - time.monotonic()

    @property
    def rounds(self) -> list[tuple[int, str]]:
        """(number, commit id) of every tag of a round."""
        matches = [(_TAG.fullmatch(name), commit) for name, commit in self.tags.items()]
        return [(int(match[1]), commit) for match, commit in matches if match]

    def call(self, method: str, **arguments: Any) -> Any:
        """A call of the client, of this repository unless it is about the user."""
        where = {} if method == "whoami" else {"repo_id": self.target.repo_id}
        call = partial(getattr(self._api, method), **where, **arguments)
        return self._translated(lambda: within(call, self.seconds_left))

    def who(self) -> Owner:
        """Whom the token belongs to."""
        return Owner.of(self.call("whoami"))

    def open(self) -> None:
        """Read the repository; make it, or the branch, if there is none."""
        if "/" not in self.target.repo_id:
            self.own(self.who().name)
        try:
            self.read()
        except HubError as error:
            if error.kind != "repository":
                raise
            self.create()
            self.read()
        self.check_private()
        if self.branches and self.target.revision not in self.branches:
            self.call("create_branch", branch=self.target.revision, exist_ok=True)
            self.read()

    def own(self, owner: str) -> None:
        """Complete the repository's name by that of the token's owner."""
        if "/" not in self.target.repo_id:
            self.target = replace(self.target, repo_id=f"{owner}/{self.target.repo_id}")

    def create(self) -> None:
        self.call("create_repo", private=self.target.private, exist_ok=True)

    def check_private(self) -> None:
        """Nothing goes to a public repository if a private one was asked for."""
        if self.target.private and not self.call("model_info").private:
            raise HubError(
                f"Expected {self.target.repo_id} to be private, as hub_private_repo asks, found it public: make it "
                "private in its settings, or choose another hub_model_id.",
                "permission",
            )

    def read(self) -> None:
        refs = self.call("list_repo_refs")
        self.branches = {ref.name: ref.target_commit for ref in refs.branches}
        self.tags = {ref.name: ref.target_commit for ref in refs.tags}

    def history(self, commit: str) -> Iterator[Commit]:
        """The commit and those before it, latest first, asked for page by page: a run may have thousands."""
        url = f"{self._api.endpoint}/api/models/{self.target.repo_id}/commits/{commit}"
        pages = paginate(url, params={}, headers=build_hf_headers(token=self.target.token))
        while True:
            found = self._translated(lambda: within(lambda: next(pages, None), self.seconds_left))
            if found is None:
                return
            yield Commit(found["id"], found.get("message") or "")

    def _translated(self, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except Exception as caught:
            error = translate(caught, self.target.repo_id, self.target.token)
        raise error  # not from the cause, whose text may hold a header


def within(call: Callable[[], Any], seconds: float) -> Any:
    """What `call()` returns or raises, if it does in time.

    The client waits for its writes without end, so the call has a thread of its own, which is left behind when time is
    up and which the end of the process does not wait for.
    """
    outcome: queue.SimpleQueue[tuple[Any, Exception | None]] = queue.SimpleQueue()

    def work() -> None:
        try:
            outcome.put((call(), None))
        except Exception as error:
            outcome.put((None, error))

    if seconds > 0:
        threading.Thread(target=work, name="hub-call", daemon=True).start()
    try:
        value, error = outcome.get(timeout=max(seconds, 0.0))
    except queue.Empty:
        raise TimeoutError("the time for it is up") from None
    if error is not None:
        raise error
    return value
