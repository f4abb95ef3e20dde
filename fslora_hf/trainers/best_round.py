"""The best of the evaluated rounds, by `metric_for_best_model`, and runs that `EarlyStoppingCallback` ends.

Evaluations run at round ends, and the Trainer's epoch is the round. The best round is kept by its number, not by its
step or folder, which depend on the layout of processes and on where the run lies.
"""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import EarlyStoppingCallback, TrainerCallback, TrainerState
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import IntervalStrategy

from ..common.processes import agree, world
from ..common.settings import did_you_mean
from ..config.federation import FederatedSketchConfig
from ..storage.checkpoint import CheckpointError, find_round, read_state
from ..storage.disk_errors import RESUME, told
from ..storage.files import write_text
from .saving import Learned

logger = logging.getLogger(__name__)

# Of the configuration, what `evaluations_at_epochs` changes while a run is on, as it is otherwise.
BETWEEN_RUNS = {"eval_strategy": "no", "eval_delay": 0}


class BestRound(ExportableState):
    """Which of a run's rounds is the best so far; callbacks' states, such as patience, are kept with it.

    Attributes:
        round: rounds that were done then, None before the first evaluation.
    """

    def __init__(self):
        self.round: int | None = None

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {"round": self.round}}

    def remember(self, state: TrainerState, exportable: Iterable[ExportableState]) -> None:
        """Put into the Trainer's state what its checkpoint shall hold, of callbacks too."""
        state.stateful_callbacks = TrainerState(stateful_callbacks=[*exportable, self]).stateful_callbacks

    def recall(
        self, state: TrainerState, exportable: Iterable[ExportableState], rounds_done: int, steps_per_round: int
    ) -> None:
        """Take from the Trainer's state what a checkpoint held; callbacks that it does not name stay as they are."""
        saved = state.stateful_callbacks
        self.round = None
        for attributes in _saved(saved, "BestRound")[:1]:
            round = attributes.get("round")
            if isinstance(round, int) and 0 < round <= rounds_done:
                self.round = round
                state.best_global_step = round * steps_per_round
        alike: dict[str, list] = {}
        for callback in exportable:
            alike.setdefault(type(callback).__name__, []).append(callback)
        for name, callbacks in alike.items():
            for callback, attributes in zip(callbacks, _saved(saved, name), strict=False):
                for key, value in callback.state()["attributes"].items():
                    if isinstance(attributes.get(key), type(value)):  # nothing else is set, whatever a file says
                        setattr(callback, key, attributes[key])

    def load(self, output_dir: str, identity: Mapping[str, Any], learned: Learned) -> str | None:
        """Make the best round's adapter (and base, where the method changes it) the model's, the same in all
        processes; returns the checkpoint's folder, None if that cannot be."""
        folder = agree(lambda: find_round(output_dir, self.round, identity))
        try:
            if folder is None:
                raise CheckpointError(
                    f"Expected the checkpoint of round {self.round}, the best, in {output_dir}, found none: the model "
                    "holds the last round; copy that checkpoint there and resume to have it loaded."
                )
            agree(lambda: read_state(folder) and learned.load(folder))
        except CheckpointError as error:
            self.round = None
            logger.warning("%s", error)
            return None
        for tensor in learned.tensors() if world() > 1 else ():
            torch.distributed.broadcast(tensor.data, src=0)
        return str(folder)

    def logged(self, logs: Mapping[str, Any]) -> dict[str, int]:
        """What a log tells of the best round: the last one names it."""
        return {"best_round": self.round} if "train_runtime" in logs and self.round is not None else {}


class KeepsBestRound:
    """Of a trainer: its hooks around evaluations and the run's end. `_best` is a BestRound."""

    _best: BestRound
    # What an evaluation tells besides compute_metrics; what is told of rows that are asked has more behind it.
    measured_metrics: Sequence[str] = ("loss",)
    asked_metrics: Sequence[str] = ()

    @property
    def _exportable(self) -> list[ExportableState]:
        """The callbacks whose states checkpoints hold."""
        return [each for each in self.callback_handler.callbacks if isinstance(each, ExportableState)]

    @property
    def best_told(self) -> str:
        """A sentence on the best round, and one on a run that stopped early; empty without either."""
        sentences = []
        if self.best_words is not None:
            holds = ", whose adapter the model holds" if self.args.load_best_model_at_end else ""
            sentences.append(f"Best round of {self.rounds_done}: {self.best_words}{holds}.")
        if has_stopped(self.state, self.callback_handler.callbacks):
            sentences.append(f"EarlyStoppingCallback ended the run after {self.rounds_done} rounds.")
        return " ".join(sentences)

    @property
    def best_words(self) -> str | None:
        """Which round is the best so far and by what, None if none was chosen."""
        if self._best.round is None:
            return None
        return f"{self._best.round}, by {metric_key(self.args.metric_for_best_model)} {self.state.best_metric:.6g}"

    def best_problems(
        self, callbacks: Iterable[TrainerCallback], eval_dataset: Any, compute_metrics: Any
    ) -> Iterator[str]:
        """Why a best round could not be told, as far as that is known before a model is loaded."""
        stops = any(isinstance(callback, EarlyStoppingCallback) for callback in callbacks)
        args, name = self.args, self.args.metric_for_best_model
        if stops and not args.eval_rounds:
            yield (
                "Expected eval_rounds above 0 with EarlyStoppingCallback, found 0: set it, since the callback looks "
                "at evaluations, or leave the callback out."
            )
        elif stops and name is None:
            yield (
                "Expected metric_for_best_model with EarlyStoppingCallback, found none: set it to the metric that "
                "shall improve, such as loss."
            )
        elif name is not None and args.eval_rounds and compute_metrics is None:
            sets = [f"{each}_" for each in eval_dataset] if isinstance(eval_dataset, dict) else [""]
            known = [each + metric for each in sets for metric in (*self.measured_metrics, *self.asked_metrics)]
            asked = tuple(f"eval_{each}{metric}" for each in sets for metric in self.asked_metrics)
            key = metric_key(name)
            if key.removeprefix("eval_") not in known and not key.startswith(asked):
                remedy = did_you_mean(key.removeprefix("eval_"), known)
                yield f"Expected metric_for_best_model to be one of {', '.join(known)}, found {name!r}: {remedy}."

    def create_model_card(self, *args, **kwargs):
        super().create_model_card(*args, **kwargs)
        path = Path(self.args.output_dir) / "README.md"
        if self.best_told and self.is_world_process_zero():
            write_text(path, f"{path.read_text(encoding='utf-8').rstrip()}\n\n{self.best_told}\n", RESUME)

    def log(self, logs, start_time=None):
        logs |= self._best.logged(logs)
        super().log(logs, start_time)

    def _evaluate(self, trial, ignore_keys_for_eval, skip_scheduler=False):
        # Only eval_on_start skips the scheduler; a run that is resumed was evaluated at its start.
        if skip_scheduler and self.rounds_done:
            return {}
        return super()._evaluate(trial, ignore_keys_for_eval, skip_scheduler)

    def _determine_best_metric(self, metrics, trial):
        if self.args.metric_for_best_model is not None:
            check_metric(self.args.metric_for_best_model, metrics)
        if self.state.global_step != self.rounds_done * self.layout.steps_per_round:
            return False  # within a round, which has no checkpoint
        is_best = super()._determine_best_metric(metrics, trial)
        if is_best:
            self._best.round, self.state.best_global_step = self.rounds_done, self.state.global_step
        # Kept are the best round, if it will be loaded, and the last one of a run that stops early.
        self.control.should_save |= is_best and self.args.load_best_model_at_end
        self.control.should_save |= self.control.should_training_stop and self.args.save_rounds > 0
        self._best.remember(self.state, self._exportable)
        return is_best

    def _finalize_training(self, trial, num_train_samples, start_time):
        loads = self.args.load_best_model_at_end and self._best.round is not None
        folder = self._best.load(self.args.output_dir, self.identity, self.learned) if loads else None
        if self.best_told:
            with told(Path(self.args.output_dir) / "README.md", RESUME):
                self.create_model_card(model_name=Path(self.args.output_dir).name)
        output = super()._finalize_training(trial, num_train_samples, start_time)
        self.state.best_model_checkpoint = folder  # only now: by it the Trainer loads, and deletes other checkpoints
        return output


def has_stopped(state: TrainerState, callbacks: Iterable[TrainerCallback]) -> bool:
    """Whether an EarlyStoppingCallback's patience is used up, which it also is when such a run is resumed."""
    return state.best_metric is not None and any(
        callback.early_stopping_patience_counter >= callback.early_stopping_patience
        for callback in callbacks
        if isinstance(callback, EarlyStoppingCallback)
    )


@contextmanager
def evaluations_at_epochs(args: FederatedSketchConfig) -> Iterator[None]:
    """While a run is on, callbacks that ask for `eval_strategy` read that there are evaluations, at epochs' ends.

    The delay keeps the Trainer from adding some of its own.
    """
    if not args.eval_rounds:
        yield
        return
    args.eval_strategy, args.eval_delay = IntervalStrategy.EPOCH, args.num_rounds + 1
    try:
        yield
    finally:
        args.eval_strategy, args.eval_delay = IntervalStrategy.NO, BETWEEN_RUNS["eval_delay"]


def metric_key(name: str) -> str:
    """As evaluations call it."""
    return name if name.startswith("eval_") else f"eval_{name}"


def check_metric(name: str, metrics: Mapping[str, float]) -> None:
    """Raises ValueError if an evaluation did not tell the metric that rounds are judged by."""
    if metric_key(name) not in metrics:
        raise ValueError(
            f"Expected metric_for_best_model to be a metric of the evaluation, found {name!r} and the metrics "
            f"{', '.join(sorted(metrics))}: name one of these."
        )


def _saved(states: Any, name: str) -> list[Mapping[str, Any]]:
    """The attributes that a trainer's state holds of callbacks of this name, in their order."""
    found = states.get(name) if isinstance(states, dict) else None
    found = found if isinstance(found, list) else [found]
    attributes = [each.get("attributes") if isinstance(each, dict) else None for each in found]
    return [each if isinstance(each, dict) else {} for each in attributes]
