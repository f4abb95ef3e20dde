"""`FederatedTrainer`: what makes a Trainer of any kind train federated clients, a whole run as one `train()`.

It knows no loss. A kind of trainer puts it before a class of transformers or TRL, calls `_before_loading` and
`_after_loading` around that class's constructor, and says in `client_losses` what its clients lose.

Overrides of private hooks of the Trainer are here and in the mixins that it is made of, and were checked on
transformers 5.23.0 and trl 1.16.0.
"""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from peft import PeftConfig, PeftModel
from transformers import PreTrainedModel, ProgressCallback, Trainer

from ..common import host_memory
from ..common.processes import agree, gather
from ..config.refusals import AUTO
from ..config.schedule import round_schedule
from ..data.clients import ClientIndex
from ..data.rows import column_to_numpy
from ..methods import ClientAdapter, Method, PairChange, beside, method_class
from ..methods.contract import check_received
from ..models.adapter import global_pair, save_client_adapter, widen_adapter
from ..models.adapter_checks import check_fold
from ..models.folding import FoldedBase
from ..models.quantized import check_as_stored, keep_as_stored
from ..models.stack import ClientStack
from ..rounds.layout import Layout
from ..rounds.local import Clients, LocalClients
from ..rounds.plan import ClientPlan, RoundPlan, plan_round
from ..rounds.round import Round
from ..rounds.run import FederatedRun
from ..rounds.server import ServerState
from ..storage.checkpoint import FEEDBACK_NAME
from ..storage.folders import check_writable
from ..storage.ledger import LEDGER_NAME, Marker
from ..storage.locks import held
from ..updates.feedback import ErrorFeedback
from ..updates.movement import Movement
from ..updates.part import UpdatePart
from ..updates.pipeline import Pipeline, own_part_problems, parts_of
from .best_round import BestRound, KeepsBestRound, evaluations_at_epochs, has_stopped
from .callbacks import RoundCallback, RoundProgressCallback
from .checkpoints import KeepsCheckpoints
from .checks import (
    check_clients,
    check_own_loss,
    check_prepared_rows,
    check_round_callbacks,
    check_trainer_arguments,
    raise_together,
)
from .identity import ranks_of_clients
from .local_steps import LocalSteps, TrainsClients
from .pushing import PushesRounds
from .resume import find_start, saved_block

logger = logging.getLogger(__name__)


class FederatedTrainer(KeepsBestRound, KeepsCheckpoints, PushesRounds, TrainsClients):
    """A mixin over `transformers.Trainer`: one `train()` runs all rounds, and the Trainer's epoch is the round."""

    _bounds: Sequence[UpdatePart] = ()  # on the norms of updates
    _own_parts: Sequence[UpdatePart] = ()  # a user's, of the pipeline of updates
    _stack: ClientStack | None = None  # of the clients that this process trains, while `train()` is at work
    _resuming = "resume_from_checkpoint={checkpoint}"

    # ---- Around the constructor of the class beneath ----

    def _before_loading(
        self, given: dict[str, Any], lora: PeftConfig | None, unsupported: Mapping[str, Any], rows: Iterable[str]
    ) -> None:
        """See, before a model is loaded, that the run can begin; puts what rounds need into the callbacks.

        Args:
            given: the arguments of the constructor beneath.
            lora: of the adapter to train.
            unsupported: arguments that must be None.
            rows: problems of the rows' columns, looked for once there are rows.

        Raises:
            ValueError: lists everything that is wrong.
        """
        self.args, dataset, model = given["args"], given["train_dataset"], given["model"]
        args, held_out = self.args, given["eval_dataset"]
        callbacks = [callback() if isinstance(callback, type) else callback for callback in given["callbacks"] or []]
        own = sum(isinstance(callback, RoundCallback) for callback in callbacks)
        problems = [*check_own_loss(type(self).__name__, args)] if self._own_loss else []
        problems += check_trainer_arguments(args, dataset, model, lora, held_out, unsupported)
        raise_together([*check_round_callbacks(own or 1), *problems])
        raise_together(self.best_problems(callbacks, held_out, given.get("compute_metrics")))
        agree(lambda: check_writable(args.output_dir))
        raise_together(rows)
        raise_together(check_fold(args.method, given.get("quantization_config") is not None))
        self._count_clients(column_to_numpy(dataset, args.client_id_column), lora.r)
        self._find_hub()
        given["callbacks"] = callbacks if own else [RoundCallback(), *callbacks]
        # TRL rounds the adapters of quantized models to bfloat16, also one that was trained before.
        pair = global_pair(model) if isinstance(model, PeftModel) else ()
        self._given_pair = [{name: tensor.detach().clone() for name, tensor in side.items()} for side in pair]

    def _take_own_parts(self, parts: Sequence[UpdatePart]) -> None:
        """Have a user's parts in the pipeline of updates.

        Raises:
            ValueError: they are none.
        """
        raise_together(own_part_problems(parts))
        self._own_parts = tuple(parts)

    def _count_clients(self, column: np.ndarray, global_rank: int) -> None:
        args = self.args
        self._given_ids = ClientIndex.from_column(column, args.client_id_column).ids
        clients = len(self._given_ids)
        self.client_ranks = ranks_of_clients(args, clients, global_rank)
        raise_together(check_clients(args, clients, self.client_ranks, global_rank))
        self.cohort_size = args.clients_per_round or clients

    def _after_loading(self) -> None:
        """Make the model that was loaded, and the rows that were prepared, those of a run."""
        args = self.args
        raise_together(check_as_stored(self.model))
        keep_as_stored(self.model)
        ids = column_to_numpy(self.train_dataset, args.client_id_column)
        raise_together(check_prepared_rows(args, self.train_dataset, self.row_columns, self._given_ids, ids))
        widen_adapter(self.model)
        for tensors, exact in zip(global_pair(self.model), self._given_pair, strict=False):
            for name, tensor in tensors.items():
                tensor.data.copy_(exact[name])
        self._given_pair.clear()
        self.prepare(self.model.get_base_model())
        if self.pop_callback(ProgressCallback) is not None:
            self.add_callback(RoundProgressCallback())
        self._best = BestRound()
        self._bind_callbacks()
        self._plan_rounds(ClientIndex.from_column(ids), self.model.peft_config["default"].r)
        self._steps = LocalSteps()

    def prepare(self, base: PreTrainedModel) -> None:
        """What a kind of trainer changes in the base model before training."""

    def _bind_callbacks(self) -> None:
        callbacks = self.callback_handler.callbacks
        for callback in callbacks:
            if isinstance(callback, (RoundCallback, RoundProgressCallback)):
                callback.trainer = self
        own = [callback for callback in callbacks if isinstance(callback, RoundCallback)]
        lacking = self.best_problems(callbacks, self.eval_dataset, self.compute_metrics)
        raise_together([*check_round_callbacks(len(own)), *lacking])
        (self._round_callback,) = own

    def _plan_rounds(self, index: ClientIndex, global_rank: int) -> None:
        args = self.args
        self.client_index = index
        self._schedule = round_schedule(args, args.num_rounds)
        block = 1 if args.per_device_train_clients == AUTO else args.per_device_train_clients
        planner = partial(
            plan_round,
            seed=args.seed,
            data_seed=args.data_seed,
            index=index,
            ranks=self.client_ranks,
            global_rank=global_rank,
            clients_per_round=self.cohort_size,
            local_steps=args.local_steps,
            examples_per_step=args.per_device_train_batch_size * args.gradient_accumulation_steps,
            learning_rate=lambda round: args.learning_rate * self._schedule(round),
            sketch_scope=args.sketch_scope,
            client_weighting=args.client_weighting,
        )
        plan = lru_cache(maxsize=4)(planner)
        self.run = FederatedRun(plan, self._laid_out(block), args.num_rounds, args.upload_budget)

    def _laid_out(self, block_size: int) -> Layout:
        args = self.args
        return Layout(self.cohort_size, args.local_steps, block_size, args.world_size, args.process_index)

    # ---- What users call ----

    def round_plan(self, round: int) -> RoundPlan:
        """What happens in a round, counted from 0: the same on any process, before, during and after training."""
        return self.run.plan(round)

    def train(self, resume_from_checkpoint: str | bool | None = None, trial=None, ignore_keys_for_eval=None):
        """Run all rounds, or those that are left from a checkpoint on.

        Args:
            resume_from_checkpoint: a checkpoint's folder, True for the latest finished one in `output_dir`, `hub` for
                the latest round in the run's repository, or `owner/name@round-0010`.

        Raises:
            FolderInUse: another launch trains in `output_dir`.
            RunLost: the run has learned nothing, or nothing good any more (see `max_lost_rounds`).
        """
        self._bind_callbacks()
        with held(self.args.output_dir):
            return self._train(resume_from_checkpoint, trial, ignore_keys_for_eval)

    def _train(self, resume, trial, ignore_keys_for_eval):
        ended = False
        on_host = self.args.device.type == "cpu" and host_memory.keep_freed_memory()
        try:
            agree(self._open_hub)
            checkpoint = agree(lambda: find_start(self.this_run, resume))
            if self.args.per_device_train_clients == AUTO:
                self.run.layout = self._laid_out(agree(lambda: saved_block(checkpoint)) or self._fit_block())
            self._open_run()
            with evaluations_at_epochs(self.args):
                output = self._take_steps(checkpoint, trial, ignore_keys_for_eval)
            ended = True
            self._round_callback.watch.close(self.args.output_dir, self._resuming)
            return output
        except Exception as error:
            self._interrupted(error)
            raise
        finally:
            self._close_run()
            if on_host:
                host_memory.return_freed_memory()
            if self.publisher is not None:
                self.publisher.close(wait=ended)

    def _take_steps(self, checkpoint=None, trial=None, ignore_keys_for_eval=None):
        """The Trainer's own loop, in a run that is open."""
        return super().train(checkpoint, trial, ignore_keys_for_eval)

    def save_client_adapter(self, path: str | Path, client: ClientPlan) -> None:
        """Write what `client` would receive of the global adapter as it is now: a plain PEFT adapter of its rank."""
        server = ServerState(*global_pair(self.model))
        method = method_class(self.args.method)()
        received = check_received(method, server, client, method.receive(server, client, client.sketch))
        if method.beside_global:
            received = beside(server, received)
        save_client_adapter(path, received, self.model.peft_config["default"])

    @property
    def in_run(self) -> bool:
        """Whether `train()` is at work."""
        return self.run.is_open

    @property
    def layout(self) -> Layout:
        """How clients are spread over steps and processes."""
        return self.run.layout

    @property
    def rounds_done(self) -> int:
        """Rounds that are over."""
        return self.run.rounds_done

    @property
    def global_tensors(self) -> list[torch.Tensor]:
        """A and B of the global adapter, of all modules."""
        return [tensor for side in global_pair(self.model) for tensor in side.values()]

    @property
    def ledger_path(self) -> Path:
        return Path(self.args.output_dir) / LEDGER_NAME

    # ---- What the round callback calls ----

    def log_round(self, logs: dict[str, float]) -> None:
        """Log what a round came to, beside what the Trainer logs of steps."""
        # Not TRL's log, which would empty the metrics of the logging window in progress; and logging must not cancel
        # the log that is due at this very step.
        due = self.control.should_log
        Trainer.log(self, logs)
        self.control.should_log = due

    def check_trained(self, record: dict[str, Any]) -> None:
        """End the run if a targeted layer is not trained, once the round's line is in the ledger."""
        self._movement.judge(record["round"], record["learning_rate"], gather)

    @property
    def run_ends(self) -> bool:
        """Whether the round that is just over is the run's last: all are done, the budget of uploads is used up,
        nothing has improved for as long as EarlyStoppingCallback waits, or the run is lost."""
        lost = self._round_callback.watch.run_is_lost
        return self.run.is_over or lost or has_stopped(self.state, self.callback_handler.callbacks)

    # ---- The run ----

    def _open_run(self) -> None:
        args = self.args
        A, B = global_pair(self.model)
        if args.world_size > 1:
            for tensor in (*A.values(), *B.values()):
                torch.distributed.broadcast(tensor.data, src=0)
        method = method_class(args.method)()
        self._feedback = self._open_feedback() if self.keeps_feedback else None
        self._movement = Movement(A, method.trains, args.local_steps, args.learning_rate)
        self._marker = Marker(self.ledger_path)
        parts = parts_of(args, method, self._movement, self._feedback, self._bounds, self._own_parts)
        # Which may have been set anew between two calls of `train()`, the second of which makes the run longer.
        self.run.num_rounds, self.run.upload_budget = args.num_rounds, args.upload_budget
        self.run.open(*self._halves(method, Pipeline(parts)))
        self.optimizer = None  # one of an earlier call would hold parameters that are gone
        if self.publisher is not None:
            self.publisher.start()

    def _halves(self, method: Method, updates: Pipeline) -> tuple[Clients, Round | None]:
        """The clients' half of a round, and the server's."""
        round = self._server_half(method, updates)
        return self._clients_here(method, updates, round.give), round

    def _server_half(self, method: Method, updates: Pipeline) -> Round:
        args, (A, B) = self.args, global_pair(self.model)
        base = FoldedBase.of(self.model) if method.folds else None
        return Round(
            method=method,
            state=ServerState(A, B, args.server_optim, args.resolved_server_learning_rate, base),
            updates=updates,
            sum_over_processes=torch.distributed.all_reduce if args.world_size > 1 else lambda tensor: None,
            gather=gather_object if args.world_size > 1 else lambda objects: objects,
            stepped=self._server_stepped,
        )

    def _clients_here(
        self, method: Method, updates: Pipeline, receive: Callable[[ClientPlan], ClientAdapter]
    ) -> LocalClients:
        """Clients that train in this process; `receive` says what each begins a round with."""
        clients, rank = min(self.layout.block_size, self.cohort_size), int(self.client_ranks.max())
        beside_global = method.beside_global
        self._stack = ClientStack(self.model, clients, rank, trains=method.trains, beside_global=beside_global)
        self._stack.attach()
        return LocalClients(
            layout=self.layout,
            stack=self._stack,
            receive=receive,
            updates=updates,
            began=self._round_began,
            loaded=self._clients_loaded,
        )

    def _server_stepped(self, round: int, change: PairChange | None) -> None:
        """Told of each step of the server."""

    def _round_began(self, plan: RoundPlan) -> None:
        # Dropout's numbers depend on the round and the process alone, so that a resumed round draws them anew.
        self._steps.begin_round(self.args.seed, "dropout", plan.round, self.args.process_index)

    @property
    def keeps_feedback(self) -> bool:
        """Whether what clients leave out of their updates is kept here."""
        return self.args.error_feedback

    def _open_feedback(self) -> ErrorFeedback:
        feedback = ErrorFeedback(Path(self.args.output_dir) / FEEDBACK_NAME)
        agree(feedback.restore)
        if not all(gather(feedback.folder.is_dir())):
            raise ValueError(
                f"Expected every process to see {feedback.folder}, found one that does not: put output_dir on a disk "
                "that all machines share, or turn error_feedback off."
            )
        return feedback

    def _interrupted(self, error: Exception) -> None:
        """Called when an error ends `train()`."""

    def _close_run(self) -> None:
        self.run.close()
        if self._stack is not None:
            self._stack.detach()
            self._stack = None

    def _maybe_log_save_evaluate(self, *args, **kwargs):
        super()._maybe_log_save_evaluate(*args, **kwargs)
        between = self.state.global_step == self.run.steps_done
        if between or self.control.should_training_stop:
            self._publish()
