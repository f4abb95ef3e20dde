"""A run's rounds on their way to the Hub: what a round's commit holds, and when it is made.

A snapshot is taken at a round's end, after its evaluation and before its checkpoint, and is never written to again;
pushing goes on beside training, and what it does or fails to do never reaches the training loop.
"""

import json
import logging
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub.constants import ENDPOINT

from ..models.description import quantization_of
from ..reports.entries import parse_entry
from ..reports.ledger import read_ledger, totals
from ..storage.checkpoint import write_state
from ..storage.ledger import LEDGER_NAME
from ..storage.result_files import IN_LOOP, RESULTS
from .card import COMMONSENSE, CardContext, eval_results_yaml, render_card
from .errors import HubError
from .fetch import RESULTS_FOLDER, RESUMED
from .figures import note_figures
from .outbox import OUTBOX_NAME, Outbox
from .pusher import BackgroundPusher, Report, push_pending
from .remote import HubTarget, Remote, check_target
from .uploader import check_run

if TYPE_CHECKING:
    from ..config.federation import FederatedSketchConfig
    from ..trainers.federated import FederatedTrainer

logger = logging.getLogger(__name__)

_CHECK_S = 60.0  # seconds for the questions before the first step


def find_target(args: "FederatedSketchConfig") -> tuple[HubTarget, bool]:
    """Where the rounds of a run go, with the repository's full name, and whether the Hub could be reached.

    Raises:
        HubError: it is known already that nothing can be pushed there.
    """
    repository = args.hub_model_id or Path(args.output_dir).resolve().name
    target = HubTarget(repository, args.hub_token, args.hub_private_repo, args.hub_revision or "main")
    found = check_target(target)
    return found or target, found is not None


class RoundPublisher:
    """Pushes the rounds of one run; the first process has one, the others have none.

    Args:
        reached: whether the Hub answered when the target was found; if not, that was told already.
    """

    def __init__(self, args: "FederatedSketchConfig", target: HubTarget, reached: bool):
        self.target, self.report = target, None
        self._limits = {"deadline_s": args.hub_deadline}
        self._told = () if reached else ("network", "server")
        self._pusher: BackgroundPusher | None = None

    def open(self, trainer: "FederatedTrainer", identity: Callable[[], Mapping[str, Any]]) -> None:
        """See, before anything of the run is changed, that its rounds can go where they shall.

        Raises:
            HubError: the outbox is of other rounds, or the repository of another run.
            OSError: there can be no outbox.
        """
        self.trainer, self._identity = trainer, identity
        self._lost: dict[int, str] = {}
        self._published = 0
        self.outbox = Outbox(Path(trainer.args.output_dir) / OUTBOX_NAME)
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

    def publish(self, resumed: bool = False) -> None:
        """Take the snapshot of the round that is just over, if it is one to push and was not taken before.

        Args:
            resumed: it was over in an earlier call of `train()`, and may have a snapshot from then.
        """
        args, done = self.trainer.args, self.trainer.rounds_done
        if self._pusher is None or done == self._published:
            return
        ends = self.trainer.run_ends or self.trainer.control.should_training_stop
        if not ends and (args.push_rounds == 0 or done % args.push_rounds):
            return
        self._published = done
        if resumed and self.outbox.holds(done):
            return
        try:
            self.outbox.add(done, self._fill)
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
            rounds = min(rounds, 1) if self.trainer.args.world_size > 1 else rounds
            report = self._pusher.close(wait_s=self._limits["deadline_s"] * rounds)
            self.report, self._pusher = report.with_lost(self._lost), None
        return self.report

    def push_missing(self) -> Report | None:
        """Between calls of `train()`: send what is still missing; returns what became of all rounds."""
        if self._pusher is None and self.report is not None:
            self.report = push_pending(self.target, self.outbox, **self._limits).with_lost(self._lost)
        return self.report

    def _fill(self, folder: Path) -> None:
        trainer, args = self.trainer, self.trainer.args
        trainer.snapshot(resumable=args.push_resume_state).save(folder)
        shutil.copyfile(trainer.ledger_path, folder / LEDGER_NAME)
        write_state(folder, trainer.rounds_done, self._identity(), RESUMED if args.push_resume_state else ())
        results = self._copy_results(folder) if args.push_eval_results else []
        rounds = read_ledger(folder / LEDGER_NAME)
        evaluation = {round(row["epoch"]): row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row}
        plots = note_figures(folder.parent, f"{args.method}, {len(rounds)} rounds", evaluation, results)
        context = self._context(rounds, results, plots)
        (folder / "README.md").write_text(render_card(context), encoding="utf-8")
        scores = eval_results_yaml(context) if args.push_eval_yaml else None
        if scores is not None:
            (folder / ".eval_results").mkdir()
            (folder / ".eval_results" / "fslora_hf.yaml").write_text(scores, encoding="utf-8")

    def _context(self, rounds: list[dict], results: list[dict], plots: dict[str, str]) -> CardContext:
        trainer, args = self.trainer, self.trainer.args
        lora = trainer.model.peft_config["default"]
        base = trainer.model.get_base_model()
        targets = lora.target_modules if isinstance(lora.target_modules, str) else sorted(lora.target_modules)
        low, high = int(trainer.client_ranks.min()), int(trainer.client_ranks.max())
        facts = {"data": f"{len(trainer.train_dataset):,} rows", **trainer.card_facts}
        return CardContext(
            name=self.target.repo_id.split("/")[-1],
            repo_id=self.target.repo_id,
            base_model=base.config.name_or_path,
            base_revision=getattr(base.config, "_commit_hash", None),
            quantization=quantization_of(base),
            method=args.method,
            rank=lora.r,
            alpha=lora.lora_alpha,
            target_modules=targets,
            client_ranks=str(low) if low == high else f"{low} to {high}",
            num_clients=len(trainer.client_index),
            clients_per_round=trainer.cohort_size,
            local_steps=args.local_steps,
            rounds_done=trainer.rounds_done,
            num_rounds=args.num_rounds,
            totals=totals(rounds),
            best=trainer.best_words,
            results=results,
            benchmarks=COMMONSENSE if facts.pop("commonsense", False) else {},
            plots=plots,
            pushed_rounds=[each.round for each in self.outbox.all() if each.round < trainer.rounds_done],
            endpoint=ENDPOINT,
            **facts,
        )

    def _copy_results(self, folder: Path) -> list[dict]:
        """The result files of every evaluated round so far, beside the adapter; returns what they hold."""
        found = []
        for path in sorted((Path(self.trainer.args.output_dir) / IN_LOOP).glob(f"*{RESULTS}")):
            text = path.read_text(encoding="utf-8", errors="replace")
            try:
                parse_entry(text, None, path.as_posix())  # it may have come from the Hub with the round
            except ValueError as error:
                logger.warning("Left out of the card of round %d: %s", self.trainer.rounds_done, error)
                continue
            content = json.loads(text)
            (folder / RESULTS_FOLDER).mkdir(exist_ok=True)
            names = [path.name, content["outcomes"]]
            for name in (name for name in names if path.with_name(name).is_file()):
                shutil.copyfile(path.with_name(name), folder / RESULTS_FOLDER / name)
            found.append(content)
        return found
