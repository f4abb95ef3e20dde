"""The pending snapshots of an outbox on their way to the Hub, in order: beside training, and once more at the end."""

import logging
import threading
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from ..reports.tables import as_text
from .errors import HubError, translate
from .outbox import Outbox, Snapshot
from .uploader import HubTarget, push_snapshot

logger = logging.getLogger(__name__)

_NOT_SENT = "not sent yet: send it with recipes/push.py"


@dataclass(frozen=True)
class Report:
    """What became of the rounds of an outbox: for each its snapshot and, if it is missing on the Hub, why."""

    rows: tuple[tuple[Snapshot, str | None], ...]

    @property
    def missing(self) -> list[int]:
        """The rounds that are not on the Hub."""
        return [snapshot.round for snapshot, problem in self.rows if problem is not None]

    def with_lost(self, lost: Mapping[int, str]) -> "Report":
        """The same with rounds of which no snapshot could be kept (round -> why)."""
        rows = {snapshot.round: (snapshot, problem) for snapshot, problem in self.rows}
        for round, why in lost.items():
            rows[round] = Snapshot(round, f"round-{round:04d}", Path(), "", "", status="lost"), why
        return Report(tuple(rows[round] for round in sorted(rows)))

    def __str__(self) -> str:
        """A table of rounds, tags, commits and what is missing."""
        if not self.rows:
            return "No rounds to push."
        lines = [("round", "tag", "commit", "on the Hub")]
        for snapshot, problem in self.rows:
            commit = (snapshot.commit or "-")[:12]
            lines.append((str(snapshot.round), snapshot.tag, commit, problem or "yes"))
        return "\n".join(line.rstrip() for line in as_text(lines, left=(1, 2, 3)))


def push_pending(target: HubTarget, outbox: Outbox, **limits: float) -> Report:
    """Push what is pending, in order; `limits` are those of `push_snapshot`, for each round."""
    return report(outbox, {snapshot.round: str(error) for snapshot, error in _push(target, outbox, limits) if error})


def report(outbox: Outbox, problems: Mapping[int, str]) -> Report:
    """The table of all rounds, with the problems met with (round -> sentence) where they are not on the Hub."""
    known = {"pushed": None, "damaged": "its push.json is damaged: move its folder away and run the round again"}
    return Report(
        tuple(
            (snapshot, known.get(snapshot.status, problems.get(snapshot.round, _NOT_SENT)))
            for snapshot in outbox.all()
        )
    )


def _push(
    target: HubTarget, outbox: Outbox, limits: Mapping[str, float]
) -> Iterator[tuple[Snapshot, HubError | None]]:
    """Push in order, up to a failure that later rounds would meet, too."""
    for snapshot in outbox.pending():
        try:
            push_snapshot(target, outbox, snapshot, **limits)
        except Exception as caught:  # whatever it is, no other round shall suffer
            error = translate(caught, target.repo_id, target.token)
            yield snapshot, error
            if not error.this_round:
                return
        else:
            yield snapshot, None


class BackgroundPusher:
    """A thread that pushes what is pending beside training, whenever it is woken; it never raises into it.

    A round that failed is tried again when the thread is next woken. Failures of one kind give one warning.

    Args:
        warned: kinds of failure that were told before: "network" and "server", if `check_target` met them.
        limits: those of `push_snapshot`.
    """

    def __init__(self, target: HubTarget, outbox: Outbox, warned: Collection[str] = (), **limits: float):
        self._target, self._outbox, self._limits = target, outbox, limits
        self._problems: dict[int, str] = {}
        self._warned = set(warned)
        self._woken = threading.Event()
        self._closing = self._left = False
        self._thread = threading.Thread(target=self._run, name="hub-pusher", daemon=True)
        self._thread.start()

    def wake(self) -> None:
        """There may be something to push."""
        self._woken.set()

    def close(self, wait_s: float) -> Report:
        """Try what is pending once more, for up to `wait_s` seconds, and end; returns what became of all rounds."""
        self._closing = True
        self._woken.set()
        try:
            self._thread.join(wait_s)
        except KeyboardInterrupt:
            logger.warning("The wait for the Hub was broken off: send what is missing with recipes/push.py.")
        self._left = True  # a thread that is late goes on with nothing further
        return report(self._outbox, dict(self._problems))

    def _run(self) -> None:
        while not self._left:
            self._woken.wait()
            self._woken.clear()
            closing = self._closing  # read first: what was added before closing is pending now
            try:
                self._push()
            except Exception as error:  # whatever it is, training goes on
                self._warn(translate(error, self._target.repo_id, self._target.token))
            if closing:
                return

    def _push(self) -> None:
        for snapshot, error in _push(self._target, self._outbox, self._limits):
            if error is None:
                self._problems.pop(snapshot.round, None)
                self._warned -= {"network", "server"}  # it has passed; the next one is another
            else:
                self._problems[snapshot.round] = str(error)
                self._warn(error)
            if self._left:
                return

    def _warn(self, error: HubError) -> None:
        if error.kind not in self._warned:
            self._warned.add(error.kind)
            logger.warning("%s", error)
