"""`FederatedSketchTrainer`: a whole federated run as one `Trainer.train()`.

Every override of a private hook of the Trainer is in this file or in best_round.py, and was checked on transformers
5.23.0 and trl 1.16.0.
"""

import copy
import json
import logging
import math
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from peft import PeftConfig, PeftModel
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProgressCallback, TrainerCallback
from trl import SFTTrainer
from trl.trainer.utils import global_then_local_main_first

from ..common import host_memory
from ..common.processes import agree, gather, rank
from ..common.settings import written
from ..config.federation import FederatedSketchConfig
from ..config.refusals import AUTO
from ..config.schedule import round_schedule
from ..data.clients import ClientIndex
from ..data.rows import column_to_numpy, drop_unscored, fit_rows
from ..data.tokens import tokenise_texts
from ..evaluation.round_scores import RoundScorer
from ..hub.publisher import RoundPublisher, find_target
from ..methods import beside, method_class
from ..methods.contract import check_received
from ..models.adapter_checks import check_fold, check_layers
from ..models.folding import FOLDED_NAME, FoldedBase
from ..models.joined_rows import StepCost, keeps_rows_apart
from ..models.quantized import check_as_stored, keep_as_stored
from ..models.scored_head import add_scored_head
from ..models.stack import ClientStack, global_pair, read_global_pair, save_client_adapter, widen_adapter
from ..models.targets import unmatched_targets_told
from ..rounds.layout import Layout
from ..rounds.plan import ClientPlan, RoundPlan, plan_round
from ..rounds.round import RoundEngine
from ..rounds.server import ServerState
from ..rounds.watch import RunWatch
from ..storage.checkpoint import FEEDBACK_NAME, SERVER_NAME, read_state, rotate, whole_folder
from ..storage.disk_errors import RESUME, told
from ..storage.files import whole_files
from ..storage.folders import check_writable
from ..storage.ledger import LEDGER_NAME, Marker, read_records
from ..storage.locks import held
from ..updates.bounds import check_finite
from ..updates.feedback import ErrorFeedback
from ..updates.movement import Movement
from ..updates.top_k import TopK
from . import resume as run
from .best_round import BETWEEN_RUNS, BestRound, KeepsBestRound, best_problems, evaluations_at_epochs, has_stopped
from .block_size import fit_block
from .callbacks import RoundCallback, RoundProgressCallback
from .chat_template import borrowed_template, end_turns_alike
from .checks import (
    check_clients,
    check_columns,
    check_own_loss,
    check_prepared_rows,
    check_round_callbacks,
    check_trainer_arguments,
    raise_together,
)
from .loader import RoundBatches, RoundLoader
from .local_steps import LocalSteps
from .token_metrics import TokenMetrics

logger = logging.getLogger(__name__)


def _plain(value: Any) -> Any:
    """What JSON can hold of a value it does not know: numpy's numbers as numbers, all else as text."""
    return value.item() if hasattr(value, "item") else str(value)


def _shaped_as(parameter: torch.Tensor, fresh: Any) -> Any:
    """A copy of an optimizer's fresh state, an equal number for each element, of which a parameter now has fewer."""
    if isinstance(fresh, torch.Tensor) and fresh.dim() == parameter.dim():
        return fresh.flatten()[: parameter.numel()].view_as(parameter).clone()
    return copy.deepcopy(fresh)


class FederatedSketchTrainer(KeepsBestRound, SFTTrainer):
    """TRL's SFTTrainer for federated LoRA over clients of different ranks.

    One call of `train()` runs all rounds. In each, a cohort of clients trains sketches of the global adapter, which is
    the ordinary PEFT adapter `default`; at the round's end their changes are folded into it. `default` holds the
    global adapter whenever a round is over. The Trainer's epoch is the round.

    Args:
        model, args, ...: as SFTTrainer's, with a `FederatedSketchConfig`.
        train_dataset: one `datasets.Dataset` with an integer column, `args.client_id_column`, that says whose each row
            is. Ids may be sparse.
        peft_config: a plain `LoraConfig` with the global rank, unless `model` has such an adapter already.
        callbacks: as usual; a `RoundCallback` among them takes the built-in's place.

    Raises:
        ValueError: lists everything that is wrong with the arguments, before the model is loaded where possible.
    """

    _tag_names = ["trl", "sft", "fslora_hf"]
    _name = "Federated sketching LoRA"
    loss_is_scaled_for_ga = True  # compute_loss divides by the tokens of the whole step
    _engine_class = RoundEngine
    _resuming = "resume_from_checkpoint={checkpoint}"
    publisher: RoundPublisher | None = None  # of the first process, with push_to_hub
    card_facts: Mapping[str, Any] = {}  # fields of hub.card_context.CardContext that the trainer cannot know

    def __init__(
        self,
        model: "str | PreTrainedModel | PeftModel",
        args: FederatedSketchConfig | None = None,
        data_collator: Callable | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        compute_loss_func: Callable | None = None,
        compute_metrics: Callable | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple = (None, None),
        optimizer_cls_and_kwargs: tuple | None = None,
        preprocess_logits_for_metrics: Callable | None = None,
        quantization_config: Any = None,
        peft_config: PeftConfig | None = None,
        formatting_func: Callable | None = None,
    ):
        args = FederatedSketchConfig() if args is None else args
        lora = model.peft_config.get("default") if isinstance(model, PeftModel) else peft_config
        unsupported = {
            "optimizers": optimizers,
            "optimizer_cls_and_kwargs": optimizer_cls_and_kwargs,
            "compute_loss_func": compute_loss_func,
        }
        callbacks = [callback() if isinstance(callback, type) else callback for callback in callbacks or []]
        own = sum(isinstance(callback, RoundCallback) for callback in callbacks)
        problems = check_trainer_arguments(args, train_dataset, model, lora, eval_dataset, unsupported)
        self._own_loss = type(self).compute_loss is not FederatedSketchTrainer.compute_loss
        if self._own_loss:
            problems = [*check_own_loss(type(self).__name__, args), *problems]
        raise_together([*check_round_callbacks(own or 1), *problems])
        raise_together(best_problems(args, callbacks, eval_dataset, compute_metrics))
        agree(lambda: check_writable(args.output_dir))
        raise_together(check_columns(args, train_dataset, formatting_func, eval_dataset))
        raise_together(check_fold(args.method, quantization_config is not None))
        given = ClientIndex.from_column(column_to_numpy(train_dataset, args.client_id_column), args.client_id_column)
        self.client_ranks = run.ranks_of_clients(args, len(given), lora.r)
        raise_together(check_clients(args, len(given), self.client_ranks, lora.r))
        self.cohort_size = args.clients_per_round or len(given)
        if args.push_to_hub:
            self._hub_target, reached = agree(lambda: find_target(args))
            self.publisher = RoundPublisher(args, self._hub_target, reached) if rank() == 0 else None
        if own == 0:
            callbacks.insert(0, RoundCallback())
        # TRL rounds the adapters of quantized models to bfloat16, also one that was trained before.
        given_pair = (
            [{name: tensor.detach().clone() for name, tensor in side.items()} for side in global_pair(model)]
            if isinstance(model, PeftModel)
            else []
        )
        borrowed = borrowed_template(args, model, processing_class)
        with unmatched_targets_told(model), borrowed as processing_class:
            super().__init__(
                model=model,
                args=args,
                data_collator=data_collator,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=processing_class,
                compute_metrics=compute_metrics,
                callbacks=callbacks,
                preprocess_logits_for_metrics=preprocess_logits_for_metrics,
                quantization_config=quantization_config,
                peft_config=copy.deepcopy(peft_config),  # into which PEFT writes the targets that it makes of names
                formatting_func=formatting_func,
            )
        raise_together([*check_layers(self.model, self.aux_loss_enabled, args.method), *check_as_stored(self.model)])
        keep_as_stored(self.model)
        self.train_dataset = drop_unscored(self.train_dataset, "train")  # also of rows that were not prepared here
        prepared_ids = column_to_numpy(self.train_dataset, args.client_id_column)
        raise_together(check_prepared_rows(args, self.train_dataset, given.ids, prepared_ids))
        widen_adapter(self.model)
        for tensors, exact in zip(global_pair(self.model), given_pair, strict=False):
            for name, tensor in tensors.items():
                tensor.data.copy_(exact[name])
        base = self.model.get_base_model()
        end_turns_alike(args, base, self._tokenizer)
        add_scored_head(base)
        # NEFTune's noise is measured by the length of sequences, and a subclass's loss reads them.
        joins = args.neftune_noise_alpha is None and not self._own_loss and keeps_rows_apart(base)
        self._joining = StepCost.of(base) if joins else None
        if self.pop_callback(ProgressCallback) is not None:
            self.add_callback(RoundProgressCallback())
        self._best = BestRound()
        self._bind_callbacks()
        self._plan_rounds(ClientIndex.from_column(prepared_ids), lora.r)
        self._engine: RoundEngine | None = None
        self._steps = LocalSteps()
        self._token_metrics = TokenMetrics(partial(self.accelerator.reduce, reduction="sum"), args.device)
        self._scorer, self._asked = RoundScorer(args, eval_dataset, self.model, self.processing_class), None
        self.rounds_done, self._bytes_up = 0, 0

    def _bind_callbacks(self) -> None:
        callbacks = self.callback_handler.callbacks
        for callback in callbacks:
            if isinstance(callback, (RoundCallback, RoundProgressCallback)):
                callback.trainer = self
        own = [callback for callback in callbacks if isinstance(callback, RoundCallback)]
        lacking = best_problems(self.args, callbacks, self.eval_dataset, self.compute_metrics)
        raise_together([*check_round_callbacks(len(own)), *lacking])
        (self._round_callback,) = own

    def _plan_rounds(self, index: ClientIndex, global_rank: int) -> None:
        args = self.args
        self.client_index = index
        self._schedule = round_schedule(args, args.num_rounds)
        self._lay_out(1 if args.per_device_train_clients == AUTO else args.per_device_train_clients)
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
        self._plan = lru_cache(maxsize=4)(planner)

    def _lay_out(self, block_size: int) -> None:
        args = self.args
        self.layout = Layout(self.cohort_size, args.local_steps, block_size, args.world_size, args.process_index)

    # ---- What users call ----

    def round_plan(self, round: int) -> RoundPlan:
        """What happens in a round, counted from 0: the same on any process, before, during and after training."""
        return self._plan(round)

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
            checkpoint = agree(lambda: run.find_start(self, resume))
            if self.args.per_device_train_clients == AUTO:
                self._lay_out(agree(lambda: run.saved_block(checkpoint)) or self._fit_block())
            self._open_run()
            with evaluations_at_epochs(self.args):
                output = super().train(checkpoint, trial, ignore_keys_for_eval)
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
        return self._engine is not None

    @property
    def global_tensors(self) -> list[torch.Tensor]:
        """A and B of the global adapter, of all modules."""
        return [tensor for side in global_pair(self.model) for tensor in side.values()]

    @property
    def ledger_path(self) -> Path:
        return Path(self.args.output_dir) / LEDGER_NAME

    # ---- What the round callback calls ----

    def locate_step(self, step: int) -> tuple[int, int, int]:
        """Round, wave of clients within it, and local step within that, of a global step counted from 0."""
        round, step = divmod(step, self.layout.steps_per_round)
        return round, *divmod(step, self.layout.local_steps)

    def begin_round(self, round: int) -> None:
        # Dropout's numbers depend on the round and the process alone, so that a resumed round draws them anew.
        self._steps.begin_round(self.args.seed, "dropout", round, self.args.process_index)
        self._engine.begin_round(round)
        if round + 1 < self.args.num_rounds:
            self._ahead.submit(self._plan, round + 1)  # while this round trains

    def hand_over(self, wave: int) -> tuple[ClientPlan, ...]:
        """Load this process's clients of a wave and clear the local optimizer's state."""
        block = self._engine.hand_over(wave)
        self.optimizer.state.clear()
        for parameter, state in self._fresh_optimizer_state.items():
            self.optimizer.state[parameter] = {key: _shaped_as(parameter, value) for key, value in state.items()}
        return block

    def collect(self) -> None:
        self._engine.collect()

    def aggregate(self) -> dict[str, Any]:
        record = self._engine.close_round()
        self.rounds_done = record["round"] + 1
        self._bytes_up += record["bytes_up"]
        return record

    def check_trained(self, record: dict[str, Any]) -> None:
        """End the run if a targeted layer is not trained, once the round's line is in the ledger."""
        self._movement.settle(record["round"], record["learning_rate"], gather)

    @property
    def run_ends(self) -> bool:
        """Whether the round that is just over is the run's last: all are done, the budget of uploads is used up,
        nothing has improved for as long as EarlyStoppingCallback waits, or the run is lost."""
        budget = self.args.upload_budget
        spent = budget is not None and self._bytes_up >= budget * 1e6
        lost = self._round_callback.watch.run_is_lost
        return spent or lost or self.rounds_done == self.args.num_rounds or has_stopped(self)

    @property
    def rounds_left(self) -> int:
        """Rounds until the run ends: a guess, from the uploads so far, where a budget may end it before the last."""
        left, budget = self.args.num_rounds - self.rounds_done, self.args.upload_budget
        if budget is None or self._bytes_up == 0:
            return left
        affordable = math.ceil((budget * 1e6 - self._bytes_up) * self.rounds_done / self._bytes_up)
        return max(0, min(left, affordable))

    # ---- The run ----

    def _fit_block(self) -> int:
        """The block that all processes can train, no larger than the number of waves needs it."""
        largest = min(gather(fit_block(self)))
        return replace(self.layout, block_size=largest).even_block

    def _open_run(self) -> None:
        args = self.args
        A, B = global_pair(self.model)
        if args.world_size > 1:
            for tensor in (*A.values(), *B.values()):
                torch.distributed.broadcast(tensor.data, src=0)
        method = method_class(args.method)()
        stack = ClientStack(
            self.model,
            self._slots,
            int(self.client_ranks.max()),
            trains=method.trains,
            beside_global=method.beside_global,
        )
        stack.attach()
        base = FoldedBase.of(self.model) if method.folds else None
        self._feedback = self._open_feedback() if self.keeps_feedback else None
        self._movement = Movement(A, method.trains, args.local_steps, args.learning_rate)
        self._marker = Marker(self.ledger_path)
        self._engine = self._engine_class(
            plan=self._plan,
            layout=self.layout,
            method=method,
            server=ServerState(A, B, args.server_optim, args.resolved_server_learning_rate, base),
            stack=stack,
            transforms=(check_finite, self._movement.note),
            compressor=None if args.upload_top_k is None else TopK(args.upload_top_k, method, self._feedback),
            sum_over_processes=torch.distributed.all_reduce if args.world_size > 1 else lambda tensor: None,
            gather=gather_object if args.world_size > 1 else lambda objects: objects,
        )
        self._ahead = ThreadPoolExecutor(1, thread_name_prefix="plan")
        self.optimizer = None  # one of an earlier call would hold parameters that are gone
        self.rounds_done, self._bytes_up = 0, 0
        if self.publisher is not None:
            self.publisher.start()

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

    @property
    def _slots(self) -> int:
        """Clients that this process holds at once."""
        return min(self.layout.block_size, self.cohort_size)

    def _interrupted(self, error: Exception) -> None:
        """Called when an error ends `train()`."""

    def _close_run(self) -> None:
        if self._engine is not None:
            self._engine.stack.detach()
            self._engine = None
            self._ahead.shutdown()

    # ---- Overrides of the Trainer's hooks ----

    def _prepare_dataset(self, dataset, processing_class, args, packing, formatting_func, dataset_name):
        # TRL's truncation cuts answers and drops what it emptied without a word, so it is given no length to cut to.
        uncut = copy.copy(args)
        uncut.max_length = None
        with global_then_local_main_first():
            if formatting_func is None and not args.assistant_only_loss:
                texts = args.dataset_text_field, self.completion_only_loss
                dataset = tokenise_texts(dataset, processing_class, *texts, dataset_name, args.dataset_num_proc)
        dataset = super()._prepare_dataset(dataset, processing_class, uncut, packing, formatting_func, dataset_name)
        with global_then_local_main_first():
            bos = self._tokenizer.bos_token_id
            return fit_rows(dataset, dataset_name, args.max_length, args.overlong_prompts, bos)

    def get_train_dataloader(self) -> DataLoader:
        # Not prepared by accelerate, which would shard the batches again and synchronize generators.
        args = self.args
        workers = args.dataloader_num_workers
        return RoundLoader(
            self.train_dataset.select_columns(["input_ids", "labels"]),
            RoundBatches(self._plan, self.layout, args.per_device_train_batch_size),
            self.data_collator,
            self._joining,
            num_workers=workers,
            pin_memory=args.dataloader_pin_memory and args.device.type == "cuda",
            persistent_workers=args.dataloader_persistent_workers and workers > 0,
            prefetch_factor=args.dataloader_prefetch_factor if workers > 0 else None,
        )

    def set_initial_training_values(self, args, dataloader):
        steps, rounds = self.layout.steps_per_round, args.num_rounds
        examples = self.cohort_size * args.per_device_train_batch_size * args.gradient_accumulation_steps
        return (
            rounds,  # epochs
            steps,  # update steps an epoch
            len(self.train_dataset),
            rounds * args.local_steps * examples,  # examples seen
            self.layout.block_size * args.world_size * args.train_batch_size * args.gradient_accumulation_steps,
            steps * args.gradient_accumulation_steps,  # micro-batches an epoch
            rounds * steps,
        )

    def _prepare_for_training(self, max_steps, train_dataloader, resume_from_checkpoint):
        # evaluation_mode keeps autocast and leaves out DDP, which would average gradients of different clients.
        self.accelerator.prepare_model = partial(self.accelerator.prepare_model, evaluation_mode=True)
        try:
            return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        finally:
            del self.accelerator.prepare_model

    def create_optimizer(self, model=None):
        optimizer = super().create_optimizer(model)
        # Most optimizers start without state; Adagrad does not.
        self._fresh_optimizer_state = {p: copy.deepcopy(state) for p, state in optimizer.state.items()}
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        start, steps = self.state.global_step, self.layout.steps_per_round
        rate = LambdaLR(optimizer or self.optimizer, lambda step: self._schedule((start + step) // steps))
        self.lr_scheduler, self._created_lr_scheduler = rate, True
        return rate

    def training_step(self, model, inputs, num_items_in_batch=None):
        if inputs["input_ids"].shape[0] == 0:  # an idle slot
            return torch.zeros((), device=self.args.device)
        inputs = dict(inputs)  # as SFTTrainer has them, for a loss of a subclass
        clients, self._step_tokens = inputs.pop("clients"), inputs.pop("tokens")
        with self._steps.take(self._engine.stack, inputs["input_ids"].numel()):
            loss = super().training_step(model, inputs, num_items_in_batch)
        if self._own_loss:
            self._engine.record_loss(loss.reshape(int(clients)))  # which is one client's
        return loss.reshape(()) * self._engine.loss_share

    def _get_num_items_in_batch(self, batch_samples, device):
        """Tokens that each client of the coming step is scored on, over all its micro-batches: `[clients]`."""
        counts = [
            (b["labels"][:, 1:] != -100).sum(1).view(int(b["clients"]), -1).sum(1)
            for b in batch_samples
            if len(b["labels"])
        ]
        return sum(counts).to(device) if counts else None

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if self._engine is None or not self._engine.stack.is_at_work or not self.model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        clients = len(num_items_in_batch)
        outputs = model(**inputs, use_cache=False, fused_lm_head=True)
        token_losses = -outputs.log_probs  # zero where nothing is scored
        if self.args.loss_type == "dft":
            token_losses = token_losses * outputs.log_probs.exp().detach()
        losses = token_losses.view(clients, -1).sum(1) / num_items_in_batch
        self._token_metrics.add(outputs, self._step_tokens)
        if not self._own_loss:
            self._engine.record_loss(losses)
        if return_outputs:
            with torch.no_grad():
                outputs = model(**inputs, use_cache=False)  # with the logits, as SFTTrainer's
        return (losses.sum(), outputs) if return_outputs else losses.sum()

    def _maybe_log_save_evaluate(self, *args, **kwargs):
        if self.control.should_log and self.state.global_step > self._globalstep_last_logged:
            self._tell_tokens(self._metrics["train"])
        super()._maybe_log_save_evaluate(*args, **kwargs)
        between = self.state.global_step == self.rounds_done * self.layout.steps_per_round
        if between or self.control.should_training_stop:
            self._publish()

    def _tell_tokens(self, metrics: dict[str, Any]) -> None:
        self._token_metrics.tell(metrics)
        self._total_train_tokens += self._token_metrics.count()
        metrics["num_tokens"] = [self._total_train_tokens]

    def log(self, logs, start_time=None):
        # The run's last log tells of the steps since the one before, also if an evaluation came in between.
        if "train_runtime" in logs and self.state.global_step > self._globalstep_last_logged:
            counted: dict[str, Any] = {}
            self._tell_tokens(counted)
            logs.update({name: value for name, (value,) in counted.items()})
        logs |= self._best.logged(logs)
        super().log(logs, start_time)

    def _clip_grad_norm(self, model):
        return self._engine.stack.clip_gradients(self.args.max_grad_norm).mean()

    def _get_grad_norm(self, model, grad_norm=None):
        return self._engine.stack.clip_gradients(0.0).mean() if grad_norm is None else grad_norm

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        # Of several evaluation sets, the Trainer calls this again with the name of each. Rows that are handed in here
        # are scored for nothing but their loss.
        named = isinstance(self.eval_dataset, dict)
        self._asked = eval_dataset if named and isinstance(eval_dataset, str) else None
        if eval_dataset is None and not named:
            self._asked = ""
        try:
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        finally:
            self._asked = None

    def evaluation_loop(self, *args, **kwargs):
        # In evaluation mode the layers compute with the global adapter, whatever clients are in the stack.
        self._total_train_tokens += self._token_metrics.count()  # which TRL logs with what is evaluated
        output = super().evaluation_loop(*args, **kwargs)
        if self._asked in self._scorer.rows:
            output.metrics.update(self._scorer.score(self, self._asked, kwargs.get("metric_key_prefix", "eval")))
        return output

    # ---- The Hub: the publisher takes the place of all pushes of the Trainer ----

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        self.hub_model_id = self._hub_target.repo_id  # which was found, or made, before the model was loaded

    def _open_hub(self) -> None:
        if self.publisher is not None:
            self.publisher.open(self, partial(run.identity, self))

    def _publish(self, resumed: bool = False) -> None:
        if self.publisher is not None:
            self.publisher.publish(resumed)

    def push_to_hub(self, commit_message=None, blocking=True, token=None, revision=None, **kwargs):
        """Send the rounds that are still missing on the Hub; returns what became of all, a table when printed.

        Rounds are pushed by `train()`; afterwards there is nothing left to do unless the Hub failed. The arguments are
        the Trainer's and have no effect: each round's commit has a title of its own, and goes where the configuration
        says. None in processes other than the first.

        Raises:
            ValueError: the configuration asks for no pushing.
        """
        if not self.args.push_to_hub:
            raise ValueError(
                "Expected push_to_hub=True in the configuration, found False: set it, so that rounds are kept for "
                "pushing, or upload a checkpoint's folder with `hf upload`."
            )
        return None if self.publisher is None else self.publisher.push_missing()

    # ---- Checkpoints ----

    def _save_checkpoint(self, model, trial):
        step = self.rounds_done * self.layout.steps_per_round
        target = Path(self.args.output_dir) / f"checkpoint-{step}"
        if self.state.global_step != step and not self.control.should_training_stop:
            logger.warning("A checkpoint was asked for within a round; it is taken at the round's end.")
            self._round_callback.save_requested = True
            return
        # Stopped within a round: `default` and the server still hold the last whole round, which may not be saved yet.
        if self.state.global_step != step and (step == 0 or target.exists()):
            return
        self.store_flos()
        self._best.remember(self)
        with told(Path(self.args.output_dir) / "README.md", RESUME):
            self.create_model_card(model_name=Path(self.args.output_dir).name)
        self._publish()  # before the checkpoint: a run that is killed in between does the round again, and pushes it
        if self.args.should_save:
            with whole_folder(target, self.rounds_done, run.identity(self), self._marker) as folder:
                self._save(str(folder))
                self._engine.server.save(folder / SERVER_NAME)
                self._save_state(folder)
                if self._feedback is not None:
                    self._feedback.link_into(folder, self.rounds_done)
            self.rotate_checkpoints()

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

    def _save_state(self, folder: Path) -> None:
        # As at the round's end, also where the run is stopped within the next: what the file says must agree.
        step, rounds = self.rounds_done * self.layout.steps_per_round, float(self.rounds_done)
        replace(self.state, global_step=step, epoch=rounds).save_to_json(str(folder / "trainer_state.json"))

    def _save(self, output_dir: str | None = None, state_dict=None) -> None:
        # The plain adapter and the tokenizer; the Trainer's pickled arguments become JSON.
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        self.model.save_pretrained(str(folder), selected_adapters=["default"], save_embedding_layers=False)
        if method_class(self.args.method).folds:
            FoldedBase.of(self.model).save(folder / FOLDED_NAME)
        self.processing_class.save_pretrained(str(folder))
        values = {**written(self.args), **BETWEEN_RUNS, "per_device_train_clients": self.layout.block_size}
        arguments = json.dumps(values, indent=2, default=_plain)
        (folder / "training_args.json").write_text(arguments + "\n", encoding="utf-8")

    def load_adapter(self, folder: Path) -> None:
        """Take the global adapter from a checkpoint, and the base where the method changes it."""
        saved = read_global_pair(self.model, folder / "adapter_model.safetensors")
        for tensors, values in zip(global_pair(self.model), saved, strict=True):
            for name, tensor in tensors.items():
                tensor.data.copy_(values[name])
        if method_class(self.args.method).folds:
            FoldedBase.of(self.model).load(folder / FOLDED_NAME)

    def learned_tensors(self) -> list[torch.Tensor]:
        """What `load_adapter` writes to."""
        A, B = global_pair(self.model)
        folded = FoldedBase.of(self.model).weights if method_class(self.args.method).folds else {}
        return [*A.values(), *B.values(), *folded.values()]

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        folder = Path(resume_from_checkpoint)
        self.rounds_done = read_state(folder, verify=False)["round"]
        self.load_adapter(folder)
        self._engine.server.load(folder / SERVER_NAME, self.rounds_done)
        if self._feedback is not None:
            agree(lambda: self._feedback.restore(folder))

    def _load_rng_state(self, checkpoint):
        """Nothing to load: whatever is random in a round is seeded when the round begins."""

    def _init_training_state(self, max_steps, num_update_steps_per_epoch, num_train_epochs, resume, trial):
        super()._init_training_state(max_steps, num_update_steps_per_epoch, num_train_epochs, resume, trial)
        # The checkpoint's round counts, not its step, which another layout of processes and blocks may have written.
        self.state.global_step = self.rounds_done * self.layout.steps_per_round
        self.state.epoch = float(self.rounds_done)
        self._best.recall(self)
        if self.args.upload_budget is not None and self.rounds_done:
            self._bytes_up = agree(lambda: sum(record["bytes_up"] for record in read_records(self.ledger_path)))
        self._round_callback.watch = agree(
            lambda: RunWatch.over(self.ledger_path, self.rounds_done, self.args.max_lost_rounds)
        )
        self._publish(resumed=True)
        return self.args.num_rounds if self.run_ends else self.rounds_done, 0
