"""Ways in which the test Hub fails when a test orders it to.

hub.fault("preupload", status=503, times=2)  # two errors, then it works
hub.fault("commit", drop_answer=True)  # the commit is made, its answer is lost
hub.fault("commit", stall_s=30, times=None)  # every commit takes 30 s; `hub.release()` ends all waiting
"""

import re
import threading
from dataclasses import dataclass, field

from tests.support.hub_messages import Answer, Request


@dataclass
class Fault:
    """What happens to the next `times` requests (None: to all) whose path has these whole segments.

    Args:
        pattern: a regular expression for one or more whole segments of the percent-encoded path: "commit" does not
            match ".../commits/main".
        method: only of this method, if given.
        after: how many matching requests are spared first.
        stall_s: seconds to wait before anything else happens.
        status: this error is the answer, and nothing is executed. With a `body` (bytes, or an object sent as JSON)
            and a status of 200: a forged answer.
        reset: the connection is reset, and nothing is executed.
        drop_answer: it is executed, and the connection is closed without an answer.
        truncate: it is executed, and the answer ends in its middle.
        hits: how often it has happened.
    """

    pattern: str
    method: str | None = None
    times: int | None = 1
    after: int = 0
    stall_s: float = 0.0
    status: int | None = None
    body: object = None
    headers: dict[str, str] = field(default_factory=dict)
    reset: bool = False
    drop_answer: bool = False
    truncate: bool = False
    hits: int = 0

    @property
    def answer(self) -> Answer | None:
        """What is answered without executing anything, if this is such a fault."""
        if self.status is None and self.body is None:
            return None
        status = self.status or 200
        message = {413: "Payload too large", 402: "Payment required: storage quota exceeded"}.get(status, "ordered")
        told = {"X-Error-Message": message} if status >= 400 else {}
        return Answer({"error": message} if self.body is None else self.body, status, told | self.headers)

    def matches(self, request: Request) -> bool:
        """Whether the request is of the kind that fails."""
        found = re.search(f"(?:^|/)(?:{self.pattern})(?:/|$)", request.path)
        return found is not None and self.method in (None, request.method)


class Faults:
    """The faults that are ordered; the first that matches a request befalls it."""

    def __init__(self):
        self._ordered: list[Fault] = []
        self._lock = threading.Lock()
        self._released = threading.Event()

    def add(self, fault: Fault) -> Fault:
        """Order a fault."""
        with self._lock:
            self._ordered.append(fault)
        return fault

    def clear(self) -> None:
        """Nothing fails from now on, and what waits goes on."""
        with self._lock:
            self._ordered.clear()
        self.release()

    def release(self) -> None:
        """What waits at this moment goes on."""
        with self._lock:
            released, self._released = self._released, threading.Event()
        released.set()

    def of(self, request: Request) -> Fault | None:
        """The fault that befalls a request, counted, after its wait."""
        with self._lock:
            fault = next((fault for fault in self._ordered if fault.matches(request) and self._takes(fault)), None)
            released = self._released
        if fault is not None and fault.stall_s:
            released.wait(fault.stall_s)
        return fault

    @staticmethod
    def _takes(fault: Fault) -> bool:
        if fault.after > 0:
            fault.after -= 1
            return False
        if fault.times is not None and fault.hits >= fault.times:
            return False
        fault.hits += 1
        return True
