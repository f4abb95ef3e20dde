"""Whether a run still learns: judged round by round, from what stands in the ledger.

A round is **empty** if no update of it was folded, and **suspect** if most of its clients' losses or updates are not
finite or the losses have leapt, or if the global adapter is not finite after it; both are **lost**. Clients begin a
round with the adapter that the rounds before it came to, so a round that is not suspect proves that adapter, and with
it the checkpoint of those rounds, to be good. It also proves of losses that had leapt just before it that their
clients are hard, and not the adapter spoiled: later losses are held against them, too.
"""

import logging
import math
import statistics
from collections import deque
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from ..common.foreign_text import foreign_text
from ..common.processes import rank
from ..storage.checkpoint import proven_checkpoint
from ..storage.ledger import last_records
from ..updates.bounds import NOT_FINITE

logger = logging.getLogger(__name__)

PAST_ROUNDS = 50  # that losses are held against
FEWEST_ROUNDS = 3  # before which no loss is held against others
FEWEST_CLIENTS = 3  # a lost round, by which it is taken that losses have leapt: fewer may be hard ones by chance
_TIMES, _MORE = 2.0, 2.0  # a loss has leapt beyond so many times the median of every past round, and by so many nats


class RunLost(RuntimeError):
    """A run that has ended because it learns nothing any more. All that it has written is kept."""


class RunWatch:
    """Judges the rounds of one call of `train()`.

    Args:
        past: the last records of the run's ledger, of rounds before this call.
        rounds_done: rounds before this call.
        max_lost_rounds: empty or suspect rounds in a row after which the run ends; 0: never.

    Attributes:
        proven: how many rounds the newest adapter is of that a later round has proved to be good.
    """

    def __init__(self, past: Iterable[Mapping[str, Any]], rounds_done: int, max_lost_rounds: int):
        past = list(past)
        self.proven, self._most = 0 if past else rounds_done, max_lost_rounds
        self._bounds: deque[float | None] = deque(maxlen=PAST_ROUNDS)  # of losses, by each past round
        self._lost: list[tuple[str, float]] = []  # of the last rounds in a row that are: why, and by how many clients
        self._leapt: list[float] = []  # bounds by the losses of those that are for a leap alone
        self._finite, self._suspect = True, False
        self._folded = self._updates = self._rounds = 0
        for record in past:
            self._note(record)
        self._past, self._first = past, rounds_done

    @classmethod
    def over(cls, ledger: Path, rounds_done: int, max_lost_rounds: int) -> "RunWatch":
        """One that goes on from what the ledger of a resumed run says."""
        past = last_records(ledger, max(PAST_ROUNDS, FEWEST_CLIENTS * max_lost_rounds)) if rounds_done else ()
        return cls(past, rounds_done, max_lost_rounds)

    def judge(self, record: Mapping[str, Any], adapter: Iterable[torch.Tensor]) -> dict[str, Any]:
        """What is to be added to a round's record: why it is suspect, and the bound that losses were held against.

        Args:
            record: of the round that is just over.
            adapter: the tensors of the global adapter after it.
        """
        bounds = [bound for bound in self._bounds if bound is not None]
        bound = max(bounds) if len(bounds) >= FEWEST_ROUNDS else None
        self._finite = _all_finite(adapter)
        reason = _spoiled(record, bound) or (None if self._finite else "the global adapter is not finite after it")
        mark = {} if reason is None else {"suspect": {"reason": reason, "loss_bound": bound}}
        self._note({**record, **mark})
        self._rounds, self._updates = self._rounds + 1, self._updates + len(record["clients"])
        self._folded += _folded(record)
        return mark

    @property
    def run_is_lost(self) -> bool:
        """Whether so many rounds in a row are lost that the run must end."""
        return 0 < self._most <= len(self._lost) and self._speak_for(self._most)

    def _speak_for(self, rounds: int) -> bool:
        """Whether enough clients tell of it that the last rounds are lost."""
        return sum(clients for _, clients in self._lost) >= FEWEST_CLIENTS * rounds

    def close(self, output_dir: str | Path, resuming: str) -> None:
        """Tell, at the end of a run, how many updates were folded.

        Args:
            resuming: how one goes on from a `{checkpoint}`.

        Raises:
            RunLost: the run has learned nothing, or nothing good any more.
        """
        self._tell()
        if (found := self._what_is_wrong()) is None:
            return
        good = proven_checkpoint(output_dir, self.proven)
        on = (
            "" if good is None else f"go on from its last good checkpoint with {resuming.format(checkpoint=good)}, or "
        )
        raise RunLost(
            f"Expected a run that learns, found {found}: all that was written is kept; see to what the clients train "
            f"on, to learning_rate, lora_alpha, adam_epsilon and the base, and {on}start anew in another output_dir; "
            "max_lost_rounds says when a run is given up."
        )

    def _tell(self) -> None:
        if rank() == 0 and self._rounds:
            text = "Rounds %d to %d are over: %d of %d updates were folded into the global adapter."
            level = logging.INFO if self._folded == self._updates else logging.WARNING
            logger.log(level, text, self._first, self._first + self._rounds - 1, self._folded, self._updates)

    def _what_is_wrong(self) -> str | None:
        last = foreign_text(self._lost[-1][0]) if self._lost else ""
        if self.run_is_lost:
            return f"{len(self._lost)} rounds in a row that are lost (the last: {last})"
        if self._lost and not self._folded and not any(map(_folded, self._past)):
            updates, rounds = self._updates + sum(len(record["clients"]) for record in self._past), len(self._past)
            return f"none of {updates} updates folded in {rounds + self._rounds} rounds (the last: {last})"
        if not self._finite:
            return "a global adapter that is not finite"
        if self._suspect and self._most and self._speak_for(1):
            return f"a last round that is lost ({last})"
        return None

    def _note(self, record: Mapping[str, Any]) -> None:
        """Take a round, judged, into account."""
        suspect = record.get("suspect")
        self._suspect = suspect is not None
        losses = [loss for loss in record["losses"] if loss is not None]
        bound = max(_TIMES * (median := statistics.median(losses)), median + _MORE) if losses else None
        if suspect is not None:
            leapt = _spoiled(record, None) is None and _spoiled(record, suspect["loss_bound"]) is not None
            self._leapt += [bound] * leapt
            self._lost = [*self._lost, (suspect["reason"], len(losses) if leapt else math.inf)]
            bound = suspect["loss_bound"]
        elif not _folded(record):
            reason = min(one["reason"] for one in record["refused"])
            self._lost = [*self._lost, (f"no update was folded: {reason}", math.inf)]
        else:
            self._lost = []
        if losses and _spoiled(record, None if suspect is None else bound) is None:
            self.proven = record["round"]
            self._bounds.extend(self._leapt)
            self._leapt = []
        self._bounds.append(bound)


def _spoiled(record: Mapping[str, Any], bound: float | None) -> str | None:
    """What is wrong with the losses of most of a round's clients that were heard of, None if nothing is."""
    not_finite = {one["client_id"] for one in record["refused"] if one["reason"] == NOT_FINITE}
    refused = {one["client_id"] for one in record["refused"]}
    heard = spoiled = 0
    for client, loss in zip(record["clients"], record["losses"], strict=True):
        if loss is None and client in refused and client not in not_finite:
            continue  # it did not answer, or its update could not be read
        heard += 1
        spoiled += client in not_finite or loss is None or (bound is not None and loss > bound)
    if 2 * spoiled <= heard:
        return None
    leapt = "" if bound is None else f" or above {bound:.4g}"
    return f"the losses or updates of {spoiled} of {heard} clients are not finite{leapt}"


def _folded(record: Mapping[str, Any]) -> int:
    return len(record["clients"]) - len(record["refused"])


def _all_finite(tensors: Iterable[torch.Tensor]) -> bool:
    largest = [tensor.detach().abs().amax() for tensor in tensors]  # of NaN, NaN
    return math.isfinite(torch.stack([value.to(largest[0].device) for value in largest]).sum().item())
