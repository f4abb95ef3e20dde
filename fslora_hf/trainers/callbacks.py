"""Callbacks that run a round inside `Trainer.train()`: sketches at hand-over, aggregation at the round's end."""

import logging
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import ProgressCallback, TrainerCallback, TrainerControl

from ..rounds.plan import ClientPlan
from ..rounds.run import FederatedRun
from ..rounds.watch import RunWatch
from ..storage.ledger import append_round

logger = logging.getLogger(__name__)


class RunsRounds(Protocol):
    """The trainer, as far as the callbacks of its rounds need it; users' have it whole."""

    run: FederatedRun
    control: TrainerControl
    ledger_path: Path
    global_tensors: Iterable[torch.Tensor]
    run_ends: bool

    def is_world_process_zero(self) -> bool: ...
    def rotate_checkpoints(self) -> None: ...
    def check_trained(self, record: dict[str, Any]) -> None: ...
    def log_round(self, logs: dict[str, float]) -> None: ...


class RoundCallback(TrainerCallback):
    """Resamples sketches when clients are handed over, aggregates when a round ends, and keeps the round ledger.

    Pass an instance of a subclass in the trainer's `callbacks` and it takes the built-in's place. Overrides of
    `hand_over` and `aggregate` call `super()`, which does the work. `trainer` is set before training starts; its
    `run` says which round it is.
    """

    trainer: RunsRounds
    watch: RunWatch  # of the present, or the last, call of `train()`

    def __init__(self):
        self.save_requested = False

    def hand_over(self, wave: int) -> tuple[ClientPlan, ...]:
        """Give this process its next clients, each a fresh sketch of the global adapter; returns them (none: idle)."""
        return self.trainer.run.hand_over(wave)

    def aggregate(self) -> dict[str, Any]:
        """Fold the round into the global adapter; returns the round's ledger record."""
        return self.trainer.run.aggregate()

    def on_train_begin(self, args, state, control, **kwargs):
        self.save_requested = False
        self._started, self._first_round = time.monotonic(), self.trainer.run.locate_step(state.global_step)[0]

    def on_step_begin(self, args, state, control, **kwargs):
        round, wave, local_step = self.trainer.run.locate_step(state.global_step)
        if local_step > 0:
            return
        if wave == 0:
            self.trainer.run.begin_round(round)
        self.hand_over(wave)

    def on_step_end(self, args, state, control, **kwargs):
        round, wave, local_step = self.trainer.run.locate_step(state.global_step - 1)
        if local_step < self.trainer.run.layout.local_steps - 1:
            return
        self.trainer.run.collect()
        if wave < self.trainer.run.layout.waves - 1:
            return
        record = self.aggregate()
        record |= self.watch.judge(record, self.trainer.global_tensors)
        if state.is_world_process_zero:
            append_round(self.trainer.ledger_path, record)
        self.trainer.rotate_checkpoints()
        done, last = round + 1, self.trainer.run_ends
        self._log(record, done)
        self.trainer.check_trained(record)
        control.should_save |= self._due(args.save_rounds, done, last) or self.save_requested
        control.should_evaluate |= self._due(args.eval_rounds, done, last)
        control.should_training_stop |= last
        self.save_requested = False

    def _log(self, record: dict[str, Any], done: int) -> None:
        """Log a round's summary and warn of every update that was left out."""
        for refused in record["refused"] if self.trainer.is_world_process_zero() else ():
            text = "Round %d: the update of client %s was left out because %s."
            logger.warning(text, record["round"], refused["client_id"], refused["reason"])
        if "suspect" in record and self.trainer.is_world_process_zero():
            text = "Round %d is suspect: %s. The last checkpoint from before it stays, whatever save_total_limit says."
            logger.warning(text, record["round"], record["suspect"]["reason"])
        seconds_a_round = (time.monotonic() - self._started) / (done - self._first_round)
        logs = {
            "round": done,
            "clients_accepted": len(record["clients"]) - len(record["refused"]),
            "megabytes_up": record["bytes_up"] / 1e6,
            "minutes_left": round(seconds_a_round * self.trainer.run.rounds_left / 60, 2),
        }
        losses = [loss for loss in record["losses"] if loss is not None]
        if losses:
            logs["client_loss"] = sum(losses) / len(losses)
        self.trainer.log_round(logs)

    @staticmethod
    def _due(every: int, done: int, last: bool) -> bool:
        return every > 0 and (last or done % every == 0)


class RoundProgressCallback(ProgressCallback):
    """The Trainer's progress bar, counting in rounds and naming the clients at work."""

    trainer: RunsRounds

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        if self.training_bar is not None:
            self.training_bar.n = self.training_bar.initial = self.current_step = state.global_step
            self.training_bar.refresh()

    def on_step_begin(self, args, state, control, **kwargs):
        round, wave, local_step = self.trainer.run.locate_step(state.global_step)
        if self.training_bar is None or local_step > 0:
            return
        layout = self.trainer.run.layout
        trained = min((wave + 1) * layout.block_size * layout.processes, layout.clients_per_round)
        text = f"round {round + 1}/{args.num_rounds}, client {trained}/{layout.clients_per_round}"
        self.training_bar.set_description(text)
