"""The trainer of a federation's server."""

import logging
import re
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..rounds.layout import Layout
from ..storage.ledger import last_records, read_records
from ..trainers.checks import raise_together
from ..trainers.sft import FederatedSketchTrainer
from ..updates.bounds import MaxNorm
from ..updates.norm_bound import PAST_ROUNDS, NormBound
from ..updates.part import UpdatePart
from .exchange import Exchange
from .remote import RemoteEngine, RoundRules
from .roster import FederationError, Roster

logger = logging.getLogger(__name__)


class FederationTrainer(FederatedSketchTrainer):
    """FederatedSketchTrainer on a federation's server: everything of a round but its local steps, which nodes take.

    Its rows are placeholders that say whose each example is, and that is all that is known of them here. Checkpoints,
    evaluation, the Hub, the ledger and resuming are the simulator's.

    Args: as FederatedSketchTrainer's, with `exchange`, `roster` and `rules` before them.
    """

    _resuming = "resume=true in --run-config, once the checkpoints after {checkpoint} are moved away"

    def __init__(self, exchange: Exchange, roster: Roster, rules: RoundRules, **kwargs):
        self._roster = roster
        self._witnesses: set[int] = set()  # clients whose updates are looked at for layers that rest
        args, held_out = kwargs["args"], kwargs.get("eval_dataset")
        if args.completion_only_loss is None and held_out is not None:
            # TRL looks at the training rows, which are placeholders here, for whether prompts are scored.
            args.completion_only_loss = {"prompt", "completion"} <= set(held_out.column_names)
        self._norm_bound = None
        if rules.max_norm_ratio:
            self._norm_bound = NormBound(rules.max_norm_ratio, args.local_steps, args.error_feedback)
        bounds = None if rules.max_update_norm is None else MaxNorm(rules.max_update_norm), self._norm_bound
        self._bounds = [bound for bound in bounds if bound is not None]
        self._engine_class = partial(RemoteEngine, exchange=exchange, roster=roster, rules=rules,
                                     norm_bound=self._norm_bound, share=args.upload_top_k)  # fmt: skip
        super().__init__(**kwargs)
        if self.args.error_feedback:
            self._engine_class.keywords["checkpoints"] = self._checkpoints

    def _checkpoints(self) -> set[int]:
        """Rounds done in each checkpoint of this run's folder, whose names have them where a round is one step."""
        found = (re.fullmatch(r"checkpoint-(\d+)", path.name) for path in Path(self.args.output_dir).iterdir())
        return {int(name[1]) for name in found if name}

    def _take_own_parts(self, parts):
        super()._take_own_parts(parts)
        sending = [type(part).__name__ for part in parts if type(part).send is not UpdatePart.send]
        if sending:
            raise_together([f"Expected update_transforms without a send of their own in a federation, whose nodes "
                            f"know a recipe alone, found one of {sending[0]}: use take or settle."])  # fmt: skip

    @property
    def keeps_feedback(self):
        return False  # the nodes do

    def check_trained(self, record):
        if self.args.upload_top_k is not None:  # a layer's part may have been left out, and its node looks
            return
        self._witnesses |= {*record["clients"]} - {one["client_id"] for one in record["refused"]}
        # One node that sends zeros does not end the run of several: rounds of one client are looked at together.
        enough = len(self._witnesses) >= min(2, len(self._roster.members))
        if enough or record["learning_rate"] == 0 or self.run_ends:
            super().check_trained(record)
            self._witnesses.clear()

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self.args.error_feedback:
            self._engine.folded = last_folded(read_records(self.ledger_path))
        if self._norm_bound is not None:
            self._norm_bound.restore(last_records(self.ledger_path, PAST_ROUNDS))

    def _lay_out(self, block_size):
        # The second of two processes, which idles while the first, the nodes, trains all clients in one wave.
        self.layout = Layout(self.cohort_size, local_steps=1, block_size=self.cohort_size, processes=2, process=1)

    def _open_run(self) -> None:
        super()._open_run()
        self._roster.save(Path(self.args.output_dir))  # only now is it known that no other run lies there

    @property
    def _slots(self) -> int:
        return 1

    def _interrupted(self, error: Exception) -> None:
        # Too few updates came: the server is as it was after the last whole round, which may not have been saved yet.
        # Any other error may have come within the server's step, or before the round was in the ledger.
        if isinstance(error, FederationError) and self._engine is not None and self.rounds_done:
            self._engine.abandon()
            self.control.should_training_stop = True
            self.state.global_step = self.rounds_done + 1  # as within the next one
            try:
                self._save_checkpoint(self.model, None)
            except OSError:  # what ended the run is what its user must be told
                logger.exception("The last whole round could not be saved; the checkpoints before it are whole.")

    def _clip_grad_norm(self, model):
        return torch.zeros(())

    def log(self, logs, start_time=None):
        # Local steps are taken elsewhere: of their loss the round's own log tells.
        super().log(
            {name: value for name, value in logs.items() if name not in ("loss", "grad_norm", "train_loss")},
            start_time,
        )


def last_folded(records: Iterable[Mapping[str, Any]]) -> dict[int, int]:
    """Client -> the last round of a ledger in which its update was folded."""
    folded: dict[int, int] = {}
    for record in records:
        refused = {one["client_id"] for one in record["refused"]}
        folded |= {client: record["round"] for client in record["clients"] if client not in refused}
    return folded
