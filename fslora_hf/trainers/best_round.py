"""The best of the evaluated rounds, by `metric_for_best_model`, and runs that `EarlyStoppingCallback` ends.

Evaluations run at round ends, and the Trainer's epoch is the round. The best round is kept by its number, not by its
step or folder, which depend on the layout of processes and on where the run lies.
"""

import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import EarlyStoppingCallback, TrainerCallback, TrainerState
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import IntervalStrategy

from ..common.processes import agree, world
from ..common.settings import did_you_mean
from ..storage.checkpoint import CheckpointError, find_round, read_state
from ..storage.disk_errors import RESUME, told
from ..storage.files import write_text
from .identity import identity

if TYPE_CHECKING:
    from ..config.federation import FederatedSketchConfig
    from .federated import FederatedTrainer

logger = logging.getLogger(__name__)

# What an evaluation tells besides compute_metrics; the last two are of rows that are asked, and have more behind them.
_MEASURED = ("loss", "entropy", "mean_token_accuracy")
_ASKED = ("accuracy", "format_validity")
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

    def remember(self, trainer: "FederatedTrainer") -> None:
        """Put into the trainer's state what its checkpoint shall hold."""
        described = TrainerState(stateful_callbacks=[*_exportable(trainer), self])
        trainer.state.stateful_callbacks = described.stateful_callbacks

    def recall(self, trainer: "FederatedTrainer") -> None:
        """Take from the trainer's state what a checkpoint held; callbacks that it does not name stay as they are."""
        saved = trainer.state.stateful_callbacks
        self.round = None
        for attributes in _saved(saved, "BestRound")[:1]:
            round = attributes.get("round")
            if isinstance(round, int) and 0 < round <= trainer.rounds_done:
                self.round = round
                trainer.state.best_global_step = round * trainer.layout.steps_per_round
        alike: dict[str, list] = {}
        for callback in _exportable(trainer):
            alike.setdefault(type(callback).__name__, []).append(callback)
        for name, callbacks in alike.items():
            for callback, attributes in zip(callbacks, _saved(saved, name), strict=False):
                for key, value in callback.state()["attributes"].items():
                    if isinstance(attributes.get(key), type(value)):  # nothing else is set, whatever a file says
                        setattr(callback, key, attributes[key])

    def judged(self, trainer: "FederatedTrainer", is_best: bool) -> None:
        """After an evaluation at a round's end: keep the round if it is the best, and the last one of a run that
        stops early."""
        args, control = trainer.args, trainer.control
        if is_best:
            self.round, trainer.state.best_global_step = trainer.rounds_done, trainer.state.global_step
        control.should_save |= is_best and args.load_best_model_at_end
        control.should_save |= control.should_training_stop and args.save_rounds > 0
        self.remember(trainer)

    def load(self, trainer: "FederatedTrainer") -> str | None:
        """With `load_best_model_at_end`, make the best round's adapter (and base, where the method changes it) the
        model's, the same in all processes; returns the checkpoint's folder."""
        if not trainer.args.load_best_model_at_end or self.round is None:
            return None
        output_dir = trainer.args.output_dir
        folder = agree(lambda: find_round(output_dir, self.round, identity(trainer)))
        try:
            if folder is None:
                raise CheckpointError(
                    f"Expected the checkpoint of round {self.round}, the best, in {output_dir}, found none: the model "
                    "holds the last round; copy that checkpoint there and resume to have it loaded."
                )
            agree(lambda: read_state(folder) and trainer.load_adapter(folder))
        except CheckpointError as error:
            self.round = None
            logger.warning("%s", error)
            return None
        for tensor in trainer.learned_tensors() if world() > 1 else ():
            torch.distributed.broadcast(tensor.data, src=0)
        return str(folder)

    def logged(self, logs: Mapping[str, Any]) -> dict[str, int]:
        """What a log tells of the best round: the last one names it."""
        return {"best_round": self.round} if "train_runtime" in logs and self.round is not None else {}

    def words(self, trainer: "FederatedTrainer") -> str | None:
        """Which round is the best so far and by what, None if none was chosen."""
        if self.round is None:
            return None
        return f"{self.round}, by {metric_key(trainer.args.metric_for_best_model)} {trainer.state.best_metric:.6g}"

    def told(self, trainer: "FederatedTrainer") -> str:
        """Sentences on the best round and on a run that stopped early; empty if there is neither."""
        sentences = []
        if self.round is not None:
            holds = ", whose adapter the model holds" if trainer.args.load_best_model_at_end else ""
            sentences.append(f"Best round of {trainer.rounds_done}: {self.words(trainer)}{holds}.")
        if has_stopped(trainer):
            sentences.append(f"EarlyStoppingCallback ended the run after {trainer.rounds_done} rounds.")
        return " ".join(sentences)


class KeepsBestRound:
    """Of a trainer: its hooks around evaluations and the run's end. `_best` is a BestRound."""

    _best: BestRound

    @property
    def best_told(self) -> str:
        """A sentence on the best round, and one on a run that stopped early; empty without either."""
        return self._best.told(self)

    @property
    def best_words(self) -> str | None:
        """Which round is the best so far and by what, None if none was chosen."""
        return self._best.words(self)

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
        self._best.judged(self, is_best)
        return is_best

    def _finalize_training(self, trial, num_train_samples, start_time):
        folder = self._best.load(self)
        if self.best_told:
            with told(Path(self.args.output_dir) / "README.md", RESUME):
                self.create_model_card(model_name=Path(self.args.output_dir).name)
        output = super()._finalize_training(trial, num_train_samples, start_time)
        self.state.best_model_checkpoint = folder  # only now: by it the Trainer loads, and deletes other checkpoints
        return output


def has_stopped(trainer: "FederatedTrainer") -> bool:
    """Whether an EarlyStoppingCallback's patience is used up, which it also is when such a run is resumed."""
    return trainer.state.best_metric is not None and any(
        callback.early_stopping_patience_counter >= callback.early_stopping_patience
        for callback in trainer.callback_handler.callbacks
        if isinstance(callback, EarlyStoppingCallback)
    )


@contextmanager
def evaluations_at_epochs(args: "FederatedSketchConfig") -> Iterator[None]:
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


def best_problems(
    args: "FederatedSketchConfig", callbacks: Iterable[TrainerCallback], eval_dataset: Any, compute_metrics: Any
) -> Iterator[str]:
    """Why a best round could not be told, as far as that is known before a model is loaded."""
    stops = any(isinstance(callback, EarlyStoppingCallback) for callback in callbacks)
    name = args.metric_for_best_model
    if stops and not args.eval_rounds:
        yield (
            "Expected eval_rounds above 0 with EarlyStoppingCallback, found 0: set it, since the callback looks at "
            "evaluations, or leave the callback out."
        )
    elif stops and name is None:
        yield (
            "Expected metric_for_best_model with EarlyStoppingCallback, found none: set it to the metric that shall "
            "improve, such as loss."
        )
    elif name is not None and args.eval_rounds and compute_metrics is None:
        sets = [f"{each}_" for each in eval_dataset] if isinstance(eval_dataset, dict) else [""]
        known = [each + metric for each in sets for metric in (*_MEASURED, *_ASKED)]
        asked = tuple(f"eval_{each}{metric}" for each in sets for metric in _ASKED)
        key = metric_key(name)
        if key.removeprefix("eval_") not in known and not key.startswith(asked):
            remedy = did_you_mean(key.removeprefix("eval_"), known)
            yield f"Expected metric_for_best_model to be one of {', '.join(known)}, found {name!r}: {remedy}."


def check_metric(name: str, metrics: Mapping[str, float]) -> None:
    """Raises ValueError if an evaluation did not tell the metric that rounds are judged by."""
    if metric_key(name) not in metrics:
        raise ValueError(
            f"Expected metric_for_best_model to be a metric of the evaluation, found {name!r} and the metrics "
            f"{', '.join(sorted(metrics))}: name one of these."
        )


def _exportable(trainer: "FederatedTrainer") -> list[TrainerCallback]:
    return [each for each in trainer.callback_handler.callbacks if isinstance(each, ExportableState)]


def _saved(states: Any, name: str) -> list[Mapping[str, Any]]:
    """The attributes that a trainer's state holds of callbacks of this name, in their order."""
    found = states.get(name) if isinstance(states, dict) else None
    found = found if isinstance(found, list) else [found]
    attributes = [each.get("attributes") if isinstance(each, dict) else None for each in found]
    return [each if isinstance(each, dict) else {} for each in attributes]
