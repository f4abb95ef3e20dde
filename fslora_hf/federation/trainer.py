"""The trainer of a federation's server."""

import logging
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from ..rounds.layout import Layout
from ..storage.ledger import last_records, read_records
from ..trainers.checks import raise_together
from ..trainers.sft import FederatedSketchTrainer
from ..updates.bounds import MaxNorm
from ..updates.norm_bound import PAST_ROUNDS, NormBound
from ..updates.part import UpdatePart
from .exchange import Exchange
from .remote import RemoteClients, RoundRules
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
        self._exchange, self._roster, self._rules = exchange, roster, rules
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
        super().__init__(**kwargs)

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
            self.run.clients.folded = last_folded(read_records(self.ledger_path))
        if self._norm_bound is not None:
            self._norm_bound.restore(last_records(self.ledger_path, PAST_ROUNDS))

    def _laid_out(self, block_size):
        return Layout(self.cohort_size, local_steps=1, block_size=self.cohort_size)  # all clients in one wave

    def _halves(self, method, updates):
        round = self._server_half(method, updates)
        clients = RemoteClients(
            round=round,
            exchange=self._exchange,
            roster=self._roster,
            rules=self._rules,
            norm_bound=self._norm_bound,
            share=self.args.upload_top_k,
            checkpoints=self._checkpoints if self.args.error_feedback else None,
        )
        return clients, round

    def _server_stepped(self, round, change):
        self.run.clients.stepped(round, change)

    def _open_run(self) -> None:
        super()._open_run()
        self._roster.save(Path(self.args.output_dir))  # only now is it known that no other run lies there

    def _interrupted(self, error: Exception) -> None:
        # Too few updates came: the server is as it was after the last whole round, which may not have been saved yet.
        # Any other error may have come within the server's step, or before the round was in the ledger.
        if isinstance(error, FederationError) and self.in_run:
            self.control.should_training_stop = True
            try:
                self.save_last_round()
            except OSError:  # what ended the run is what its user must be told
                logger.exception("The last whole round could not be saved; the checkpoints before it are whole.")

    # ---- The Trainer's one step of a round, in which nodes take theirs ----

    def get_train_dataloader(self):
        accumulated = range(self.args.gradient_accumulation_steps)
        return DataLoader(accumulated, collate_fn=_no_rows, generator=torch.Generator())

    def training_step(self, model, inputs, num_items_in_batch=None):
        return torch.zeros((), device=self.args.device)

    def _get_num_items_in_batch(self, batch_samples, device):
        return None

    def _clip_grad_norm(self, model):
        return torch.zeros(())

    def _get_grad_norm(self, model, grad_norm=None):
        return torch.zeros(())

    def log(self, logs, start_time=None):
        # Local steps are taken elsewhere: of their loss the round's own log tells.
        super().log(
            {name: value for name, value in logs.items() if name not in ("loss", "grad_norm", "train_loss")},
            start_time,
        )


def _no_rows(_: list[int]) -> dict[str, torch.Tensor]:
    """A batch without rows."""
    return {"input_ids": torch.zeros(0, 1, dtype=torch.int64)}


def last_folded(records: Iterable[Mapping[str, Any]]) -> dict[int, int]:
    """Client -> the last round of a ledger in which its update was folded."""
    folded: dict[int, int] = {}
    for record in records:
        refused = {one["client_id"] for one in record["refused"]}
        folded |= {client: record["round"] for client in record["clients"] if client not in refused}
    return folded
