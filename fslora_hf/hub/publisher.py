"""A run's rounds on their way to the Hub: what a round's commit holds, and when it is made.

A snapshot is taken at a round's end, after its evaluation and before its checkpoint, and is never written to again;
pushing goes on beside training, and what it does or fails to do never reaches the training loop.
"""

import json
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub.constants import ENDPOINT

from ..config.federation import FederatedSketchConfig
from ..reports.entries import parse_entry
from ..reports.ledger import read_ledger, totals
from ..storage.checkpoint import write_state
from ..storage.ledger import LEDGER_NAME
from ..storage.result_files import IN_LOOP, RESULTS
from .card import CardContext, eval_results_yaml, render_card
from .errors import HubError
from .fetch import RESULTS_FOLDER, RESUMED
from .figures import note_figures
from .outbox import OUTBOX_NAME, Outbox
from .pusher import BackgroundPusher, Report, push_pending
from .remote import HubTarget, Remote, check_target
from .uploader import check_run

logger = logging.getLogger(__name__)

_CHECK_S = 60.0  # seconds for the questions before the first step


def find_target(args: FederatedSketchConfig) -> tuple[HubTarget, bool]:
    """Where the rounds of a run go, with the repository's full name, and whether the Hub could be reached.

    Raises:
        HubError: it is known already that nothing can be pushed there.
    """
    repository = args.hub_model_id or Path(args.output_dir).resolve().name
    target = HubTarget(repository, args.hub_token, args.hub_private_repo, args.hub_revision or "main")
    found = check_target(target)
    return found or target, found is not None


@dataclass(frozen=True)
class RoundOver:
    """The round of a run that was the last to end.

    Args:
        number: rounds that are done.
        is_last: whether the run ends with it.
        ledger: the run's, with this round in it.
        log: the Trainer's, of which the losses on held-out rows are told.
        save: writes the snapshot of the run as it is now into a folder.
        facts: fields of `CardContext`, but for those that the publisher knows.
    """

    number: int
    is_last: bool
    ledger: Path
    log: Sequence[Mapping[str, Any]]
    save: Callable[[Path], None]
    facts: Callable[[], Mapping[str, Any]]


class RoundPublisher:
    """Pushes the rounds of one run; the first process has one, the others have none.

    Args:
        reached: whether the Hub answered when the target was found; if not, that was told already.
    """

    def __init__(self, args: FederatedSketchConfig, target: HubTarget, reached: bool):
        self.target, self.report, self._args = target, None, args
        self._limits = {"deadline_s": args.hub_deadline}
        self._told = () if reached else ("network", "server")
        self._pusher: BackgroundPusher | None = None

    def open(self, identity: Callable[[], Mapping[str, Any]]) -> None:
        """See, before anything of the run is changed, that its rounds can go where they shall; `identity` tells what
        makes it that run.

        Raises:
            HubError: the outbox is of other rounds, or the repository of another run.
            OSError: there can be no outbox.
        """
        self._identity = identity
        self._lost: dict[int, str] = {}
        self._published = 0
        self.outbox = Outbox(Path(self._args.output_dir) / OUTBOX_NAME)
        self._refuse_other_target()
        if not self._told:
            self._check_run(identity())

    def start(self) -> None:
        """Begin to push what an earlier call left, and then what comes."""
        self.outbox.write_target(self.target.repo_id, self.target.revision, self.target.private)
        self._pusher = BackgroundPusher(self.target, self.outbox, warned=self._told, **self._limits)
        self._pusher.wake()

    def _refuse_other_target(self) -> None:
        """Rounds that went elsewhere would be missing here, and nobody would tell."""
        sent = [snapshot for snapshot in self.outbox.all() if snapshot.sent]
        noted = self.outbox.read_target() if sent else {}
        wanted = {"repo_id": self.target.repo_id, "revision": self.target.revision}
        # A name is short until the Hub was first reached.
        if sent and any(noted[key].split("/")[-1] != wanted[key].split("/")[-1] for key in wanted):
            raise HubError(
                f"Expected to push to {noted['repo_id']} ({noted['revision']}), where this run's rounds went before, "
                f"found {wanted['repo_id']} ({wanted['revision']}): keep hub_model_id and hub_revision, or resume in "
                "another output_dir.",
                "repository",
            )

    def _check_run(self, run: Mapping[str, Any]) -> None:
        """Raises HubError if the repository holds another run, as far as the Hub answers now."""
        try:
            remote = Remote(self.target, _CHECK_S)
            remote.open()
            check_run(remote, self.outbox, run)
        except HubError as error:
            if error.kind not in ("network", "server"):
                raise
            logger.warning("%s", error)

    def publish(self, over: RoundOver, resumed: bool = False) -> None:
        """Take the snapshot of the round that is just over, if it is one to push and was not taken before.

        Args:
            resumed: it was over in an earlier call of `train()`, and may have a snapshot from then.
        """
        every, done = self._args.push_rounds, over.number
        if self._pusher is None or done == self._published:
            return
        if not over.is_last and (every == 0 or done % every):
            return
        self._published = done
        if resumed and self.outbox.holds(done):
            return
        try:
            self.outbox.add(done, partial(self._fill, over))
        except Exception as error:  # a full disk, a card that cannot be drawn: whatever it is, training goes on
            known = isinstance(error, OSError)
            self._lost[done] = str(error) if known else f"Expected to keep round {done} for pushing, found {error!r}"
            logger.warning("%s", self._lost[done], exc_info=not known)
        self._pusher.wake()

    def close(self, wait: bool = True) -> Report | None:
        """Stop pushing; with `wait` once everything that can be pushed is."""
        if self._pusher is not None:
            rounds = len(self.outbox.pending()) if wait else 0
            # Other processes may be waiting for this one, which they do for some minutes and no longer.
            rounds = min(rounds, 1) if self._args.world_size > 1 else rounds
            report = self._pusher.close(wait_s=self._limits["deadline_s"] * rounds)
            self.report, self._pusher = report.with_lost(self._lost), None
        return self.report

    def push_missing(self) -> Report | None:
        """Between calls of `train()`: send what is still missing; returns what became of all rounds."""
        if self._pusher is None and self.report is not None:
            self.report = push_pending(self.target, self.outbox, **self._limits).with_lost(self._lost)
        return self.report

    def _fill(self, over: RoundOver, folder: Path) -> None:
        args = self._args
        over.save(folder)
        shutil.copyfile(over.ledger, folder / LEDGER_NAME)
        write_state(folder, over.number, self._identity(), RESUMED if args.push_resume_state else ())
        results = self._copy_results(folder, over.number) if args.push_eval_results else []
        rounds = read_ledger(folder / LEDGER_NAME)
        evaluation = {round(row["epoch"]): row["eval_loss"] for row in over.log if "eval_loss" in row}
        context = CardContext(
            name=self.target.repo_id.split("/")[-1],
            repo_id=self.target.repo_id,
            method=args.method,
            local_steps=args.local_steps,
            rounds_done=over.number,
            num_rounds=args.num_rounds,
            totals=totals(rounds),
            results=results,
            plots=note_figures(folder.parent, f"{args.method}, {len(rounds)} rounds", evaluation, results),
            pushed_rounds=[each.round for each in self.outbox.all() if each.round < over.number],
            endpoint=ENDPOINT,
            **over.facts(),
        )
        (folder / "README.md").write_text(render_card(context), encoding="utf-8")
        scores = eval_results_yaml(context) if args.push_eval_yaml else None
        if scores is not None:
            (folder / ".eval_results").mkdir()
            (folder / ".eval_results" / "fslora_hf.yaml").write_text(scores, encoding="utf-8")

    def _copy_results(self, folder: Path, round: int) -> list[dict]:
        """The result files of every evaluated round so far, beside the adapter; returns what they hold."""
        found = []
        for path in sorted((Path(self._args.output_dir) / IN_LOOP).glob(f"*{RESULTS}")):
            text = path.read_text(encoding="utf-8", errors="replace")
            try:
                parse_entry(text, None, path.as_posix())  # it may have come from the Hub with the round
            except ValueError as error:
                logger.warning("Left out of the card of round %d: %s", round, error)
                continue
            content = json.loads(text)
            (folder / RESULTS_FOLDER).mkdir(exist_ok=True)
            names = [path.name, content["outcomes"]]
            for name in (name for name in names if path.with_name(name).is_file()):
                shutil.copyfile(path.with_name(name), folder / RESULTS_FOLDER / name)
            found.append(content)
        return found
