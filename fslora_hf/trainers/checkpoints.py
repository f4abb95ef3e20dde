"""Checkpoints of a trainer: when one is written, and how a run goes on from one. What is in it is saving.py's."""

import logging
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from ..common.processes import agree
from ..common.settings import written
from ..rounds.watch import RunWatch
from ..storage.checkpoint import SERVER_NAME, read_state, rotate, whole_folder
from ..storage.disk_errors import RESUME, told
from ..storage.files import whole_files
from ..storage.ledger import read_records
from .best_round import BETWEEN_RUNS
from .examine import ThisRun
from .identity import identity
from .saving import Learned, Snapshot

logger = logging.getLogger(__name__)


class KeepsCheckpoints:
    """Of a trainer: its hooks of saving and resuming."""

    @cached_property
    def identity(self) -> dict[str, Any]:
        """Everything that decides what the run computes, as plain JSON values."""
        rows, clients = self.train_dataset, len(self.client_index)
        return identity(self.args, self.model, rows, clients, self.cohort_size, self._own_parts)

    @property
    def this_run(self) -> ThisRun:
        """What a checkpoint to go on from is held against."""
        return ThisRun(
            args=self.args,
            identity=self.identity,
            model=self.model,
            client_ids=self.client_index.ids,
            keeps_feedback=self.keeps_feedback,
            callbacks=[*self._exportable, self.control],
            rounds_done=self.rounds_done,
            steps_per_round=self.layout.steps_per_round,
            repository=self.hub_model_id,
        )

    def _save_checkpoint(self, model, trial):
        within = self.state.global_step != self.run.steps_done
        if within and not self.control.should_training_stop:
            logger.warning("A checkpoint was asked for within a round; it is taken at the round's end.")
            self._round_callback.save_requested = True
        elif within:
            self.save_last_round()
        else:
            self._write_checkpoint()

    def save_last_round(self) -> None:
        """Write a checkpoint of the last whole round, which `default` and the server hold also within the next one,
        unless there is one."""
        if self.rounds_done and not self._checkpoint_path.exists():
            self._write_checkpoint()

    @property
    def _checkpoint_path(self) -> Path:
        return Path(self.args.output_dir) / f"checkpoint-{self.run.steps_done}"

    def _write_checkpoint(self) -> None:
        self.store_flos()
        self._best.remember(self.state, self._exportable)
        with told(Path(self.args.output_dir) / "README.md", RESUME):
            self.create_model_card(model_name=Path(self.args.output_dir).name)
        self._publish()  # before the checkpoint: a run that is killed in between does the round again, and pushes it
        if self.args.should_save:
            with whole_folder(self._checkpoint_path, self.rounds_done, self.identity, self._marker) as folder:
                self.snapshot().save(folder)
                if self._feedback is not None:
                    self._feedback.link_into(folder, self.rounds_done)
            self.rotate_checkpoints()

    @property
    def learned(self) -> Learned:
        """The global adapter, and the base where the method changes it."""
        return Learned.of(self.model, self.args.method)

    def snapshot(self, resumable: bool = True) -> Snapshot:
        """What is written of the last round that is over; `resumable`: also what a run goes on from."""
        arguments = {**written(self.args), **BETWEEN_RUNS, "per_device_train_clients": self.layout.block_size}
        used = Snapshot(self.learned, self.processing_class, arguments)
        if not resumable:
            return used
        # As at the round's end, also where the run is stopped within the next: what the file says must agree.
        state = replace(self.state, global_step=self.run.steps_done, epoch=float(self.rounds_done))
        return replace(used, server=self.run.round.state, state=state)

    def rotate_checkpoints(self) -> None:
        """Remove the checkpoints that `save_total_limit` does not keep."""
        if self.args.should_save:
            proven = self._round_callback.watch.proven
            rotate(self.args.output_dir, self.args.save_total_limit, proven, self._best.round)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if not self.args.should_save:
            return super().save_model(output_dir, _internal_call)
        with whole_files(output_dir or self.args.output_dir, RESUME, updates=("README.md",)) as folder:
            super().save_model(str(folder), _internal_call)

    def _save(self, output_dir: str | None = None, state_dict=None) -> None:
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            self.snapshot(resumable=False).save(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        folder = Path(resume_from_checkpoint)
        self.run.rounds_done = read_state(folder, verify=False)["round"]
        self.learned.load(folder)
        self.run.round.state.load(folder / SERVER_NAME, self.rounds_done)
        if self._feedback is not None:
            agree(lambda: self._feedback.restore(folder))

    def _load_rng_state(self, checkpoint):
        """Nothing to load: whatever is random in a round is seeded when the round begins."""

    def _init_training_state(self, max_steps, num_update_steps_per_epoch, num_train_epochs, resume, trial):
        super()._init_training_state(max_steps, num_update_steps_per_epoch, num_train_epochs, resume, trial)
        # The checkpoint's round counts, not its step, which another layout of processes and blocks may have written.
        self.state.global_step = self.run.steps_done
        self.state.epoch = float(self.rounds_done)
        self._best.recall(self.state, self._exportable, self.rounds_done, self.layout.steps_per_round)
        if self.args.upload_budget is not None and self.rounds_done:
            self.run.bytes_up = agree(lambda: sum(record["bytes_up"] for record in read_records(self.ledger_path)))
        self._round_callback.watch = agree(
            lambda: RunWatch.over(self.ledger_path, self.rounds_done, self.args.max_lost_rounds)
        )
        self._publish(resumed=True)
        return self.args.num_rounds if self.run_ends else self.rounds_done, 0
