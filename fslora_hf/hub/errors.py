"""What goes wrong with the Hub, as one sentence each that holds no token."""

import re
from typing import Any

from huggingface_hub import get_token
from huggingface_hub.errors import (
    HFValidationError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from ..common import masking
from ..common.foreign_text import LONGEST, foreign_text
from ..storage.disk_errors import WriteError

LENGTH = LONGEST  # characters of the Hub's own words that a sentence repeats
LONGEST_ANSWER = 10_000  # of which these are the first; tokens are looked for in all of it
_QUOTA = re.compile(r"\b(quota|storage|limit|payment|exceed\w*|too large)\b", re.IGNORECASE)


class HubError(ValueError):
    """A failure of the Hub, or of the way to it.

    Attributes:
        kind: "token", "permission", "quota", "name", "repository", "network", "server", "moved", "tag", "content" or
            "local"; failures of one kind have one cause and need one warning.
        this_round: it is the content of this round that cannot be pushed; later rounds can.
        again: it may pass by itself within seconds.
    """

    def __init__(self, text: str, kind: str = "server", this_round: bool = False, again: bool = False):
        super().__init__(text)
        self.kind, self.this_round, self.again = kind, this_round, again


def scrub(text: str, token: str | None = None) -> str:
    """The text without the token that was given, the one of this machine's login and all that looks like one."""
    for secret in filter(None, (token, get_token())):
        text = text.replace(secret, "***")
    return masking.scrub(text)


def check_token(token: str | None) -> None:
    """Raises HubError for a token, or without one a login, that no header can hold: the client would repeat it."""
    token = token or get_token() or ""
    if not token.isascii() or any(not character.isprintable() or character.isspace() for character in token):
        raise HubError(
            "Expected a token of letters and digits, found one with other characters: give it as the Hub "
            "shows it, without spaces and line ends.",
            "token",
        )


def translate(error: Exception, repo_id: str, token: str | None = None) -> HubError:
    """The sentence for an exception of the client."""
    if isinstance(error, HubError):
        return error
    while isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception):
        error = error.__cause__  # an upload of a large file wraps what happened
    said = _said(error, token)
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status is not None:
        return _of_status(status, error, repo_id, said)
    if isinstance(error, HFValidationError):
        return HubError(
            f"Expected a repository name that the Hub takes, found {repo_id!r} ({said}): set hub_model_id to "
            "NAME or OWNER/NAME.",
            "name",
        )
    if isinstance(error, LocalTokenNotFoundError):
        return HubError(
            f"Expected a token to write to {repo_id} with, found none: pass hub_token, set HF_TOKEN or log in with "
            "'hf auth login'.",
            "token",
        )
    if isinstance(error, (ConnectionError, TimeoutError)) or type(error).__module__.startswith("httpx"):
        return HubError(
            f"Expected to reach the Hub for {repo_id}, found no answer ({said}): what is missing stays queued; send "
            "it with recipes/push.py when the network is there.",
            "network",
            again=not isinstance(error, OfflineModeIsEnabled),
        )
    if isinstance(error, WriteError):
        return HubError(str(error), "local")
    if isinstance(error, OSError):
        return HubError(
            f"Expected to read and write the outbox of {repo_id}, found '{said}': mend the disk, then run "
            "recipes/push.py.",
            "local",
            again=isinstance(error, FileNotFoundError),  # another process may have pushed it, and freed the files
        )
    if "Invalid metadata in README.md" in str(error):
        return HubError(
            f"Expected a README.md that the Hub takes for {repo_id}, found one that it refuses ({said}): mend what it "
            "names, and run the round again.",
            "content",
            this_round=True,
        )
    if isinstance(error, ValueError) and _QUOTA.search(said):  # from the list of large files
        return _no_room(repo_id, said)
    return HubError(
        f"Expected answers of the Hub for {repo_id} that its client understands, found '{said}': what is missing "
        "stays queued; send it later with recipes/push.py.",
        "server",
        again=True,
    )


def _of_status(status: int, error: Exception, repo_id: str, said: str) -> HubError:
    match status:
        case 401:
            return HubError(
                f"Expected a token that the Hub takes, found one that it refuses ({said}): make a new one with write "
                "access and pass it as hub_token, or log in with 'hf auth login'.",
                "token",
            )
        case 402 | 413 | 403 if status != 403 or _QUOTA.search(said):
            return _no_room(repo_id, said)
        case 403:
            return HubError(
                f"Expected a token that may write to {repo_id}, found one that may not ({said}): pass one with write "
                "access to it as hub_token, or choose another hub_model_id.",
                "permission",
            )
        case 404:
            return HubError(
                f"Expected {repo_id} on the Hub, found none that this token may see ({said}): check hub_model_id and "
                "hub_token.",
                "repository" if isinstance(error, RepositoryNotFoundError) else "server",
            )
        case 409 | 412:
            return HubError(
                f"Expected {repo_id} to stay as it was read, found that someone else keeps changing it ({said}): "
                "run recipes/push.py when they are done.",
                "moved",
                again=True,
            )
        case _ if status in (408, 429) or status >= 500:
            return HubError(
                f"Expected the Hub to do what was asked for {repo_id}, found an error of its own ({said}): what is "
                "missing stays queued; send it later with recipes/push.py.",
                "server",
                again=True,
            )
    return HubError(
        f"Expected a commit that the Hub takes for {repo_id}, found that it refuses this one ({said}): mend what it "
        "names, then run recipes/push.py.",
        "content",
        this_round=True,
    )


def _no_room(repo_id: str, said: str) -> HubError:
    return HubError(
        f"Expected room for the round in {repo_id}, found that the Hub refuses more ({said}): free some or raise the "
        "quota, then run recipes/push.py.",
        "quota",
    )


def _said(error: Any, token: str | None) -> str:
    """The status and the first words of an answer, or what the exception says, on one line."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    message = getattr(error, "server_message", None) or ("" if status else str(error) or type(error).__name__)
    return foreign_text(f"{status or ''} {scrub(str(message)[:LONGEST_ANSWER], token)}", LENGTH)
