"""What goes in and out of the test Hub: requests, answers, and the errors that are answers too."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs, urlsplit


@dataclass
class Answer:
    """What is sent back; a body that is no bytes is sent as JSON."""

    body: object = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class Request:
    """One request as it came, and the status it was answered with (None until then, and if it never was)."""

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

    @property
    def token(self) -> str | None:
        """The token the client showed."""
        scheme, _, token = self.headers.get("Authorization", "").partition(" ")
        return token if scheme == "Bearer" else None

    def form(self) -> dict[str, list[str]]:
        """The values of each field of a form."""
        return parse_qs(self.body.decode(), keep_blank_values=True)

    def json(self) -> Any:
        """The body, if it is JSON; a `Refused` if not."""
        try:
            return json.loads(self.body)
        except ValueError:
            raise Refused(400, "the body is no JSON") from None


class Refused(Exception):
    """An answer that is an error, with the code by which the client tells what is missing, if anything is."""

    def __init__(self, status: int, message: str, code: str | None = None, **body: Any):
        super().__init__(message)
        said = message.encode("ascii", "backslashreplace").decode()
        headers = {"X-Error-Message": said} | ({"X-Error-Code": code} if code else {})
        self.answer = Answer({"error": message} | body, status, headers)


class NotFound(Refused):
    """A 404: `code` is RepoNotFound, RevisionNotFound or EntryNotFound."""

    def __init__(self, code: str, commit: str | None = None, message: str | None = None):
        super().__init__(404, message or code, code)
        if commit:
            self.answer.headers["X-Repo-Commit"] = commit
