"""The local steps of clients in the Trainer's loop: what makes one step of it a step of every client of a block."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

from ..common.draws import seed_from
from ..common.processes import gather
from ..models.joined_rows import StepCost
from ..models.stack import ClientStack
from .block_size import LargestStep, fit_block
from .loader import RoundBatches, RoundLoader


class LocalSteps:
    """Counts the micro-batches of a round. Within each, and only there, the model computes with the clients.

    What is random in a micro-batch (dropout) is drawn anew from the round's path and the micro-batch's number, so that
    it is what it would be had nothing been drawn beside: by a callback that generates, say.
    """

    def __init__(self):
        self._path: tuple[int | str, ...] = ()
        self._taken = 0

    def begin_round(self, *path: int | str) -> None:
        """Start counting; `path` is of the round, and of the process or client that trains."""
        self._path, self._taken = path, 0

    @contextmanager
    def take(self, stack: ClientStack, positions: int) -> Iterator[None]:
        """The forward and backward pass of the next micro-batch, of so many tokens, padding included."""
        torch.manual_seed(seed_from(*self._path, self._taken))
        self._taken += 1
        with stack.at_work(positions):
            yield


class TrainsClients:
    """Of a trainer: its hooks around a step. A step's loss is the sum of its clients' own, so that no client sees
    another's gradient.

    A kind of trainer says what its clients lose, and by what their losses are divided.
    """

    row_columns: Sequence[str] = ("input_ids", "labels")  # of the prepared rows, what a step reads
    _forward_options: Mapping[str, Any] = {}  # of every forward pass of a step
    _step_borrowed = False  # whether the clients of the step at work are another process's: to be left out of all sums
    _joining: StepCost | None = None  # where a client's rows may share one row of the batch: what a step costs

    def client_losses(
        self, model: torch.nn.Module, inputs: Mapping[str, torch.Tensor], clients: int, scored: torch.Tensor | None
    ) -> torch.Tensor:
        """Each client's part, by this micro-batch, of the loss of its step: `[clients]`, with a gradient.

        Args:
            inputs: a client-major batch, `[clients * rows, ...]` each.
            scored: as `scored` counted, `[clients]`.
        """
        raise NotImplementedError(f"{type(self).__name__} says no losses of clients.")

    def trial_loss(self, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """A number whose backward pass takes what that of a step does, of a batch as the collator makes it."""
        raise NotImplementedError(f"{type(self).__name__} cannot try a step.")

    def scored(self, batches: Sequence[Mapping[str, torch.Tensor]]) -> torch.Tensor | None:
        """What each client of the coming step divides its loss by, over all its micro-batches: `[clients]`."""
        return None

    @property
    def largest_step(self) -> LargestStep:
        """What `per_device_train_clients: auto` tries."""
        return LargestStep(
            args=self.args,
            model=self.model,
            most=-(-self.cohort_size // self.args.world_size),
            rank=int(self.client_ranks.max()),
            dataset=self.train_dataset,
            columns=self.row_columns,
            collator=self.data_collator,
            loss=self.trial_loss,
        )

    def _fit_block(self) -> int:
        """The block that all processes can train, no larger than the number of waves needs it."""
        largest = min(gather(fit_block(self.largest_step)))
        return replace(self.layout, block_size=largest).even_block

    def _clients_loaded(self) -> None:
        """Give the clients that are in the model now a local optimizer of their own."""
        self.optimizer.state.clear()
        for parameter, state in self._fresh_optimizer_state.items():
            self.optimizer.state[parameter] = {key: _shaped_as(parameter, value) for key, value in state.items()}

    def get_train_dataloader(self) -> DataLoader:
        # Not prepared by accelerate, which would shard the batches again and synchronize generators.
        args = self.args
        workers = args.dataloader_num_workers
        return RoundLoader(
            self.train_dataset.select_columns(list(self.row_columns)),
            RoundBatches(self.run.plan, self.layout, args.per_device_train_batch_size),
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
        inputs = dict(inputs)  # as the Trainer has them, for a loss of a subclass
        self._step_clients, self._step_tokens = int(inputs.pop("clients")), inputs.pop("tokens")
        self._step_borrowed = self.run.clients.borrows
        with self._steps.take(self._stack, inputs["input_ids"].numel()):
            loss = super().training_step(model, inputs, num_items_in_batch)
        if self._own_loss:
            self.run.clients.record_loss(loss.reshape(self._step_clients))  # which is one client's
        share = self.run.clients.loss_share
        return loss.reshape(()) * share if share else loss.new_zeros(())  # also of a borrowed client's NaN

    def floating_point_ops(self, inputs):
        return super().floating_point_ops(self._own_rows(inputs))

    def _track_num_input_tokens(self, inputs):
        super()._track_num_input_tokens(self._own_rows(inputs))

    def _own_rows(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """What of a step's inputs the run's counts are of: nothing of what is borrowed."""
        if not self._step_borrowed:
            return inputs
        return {name: value[:0] for name, value in inputs.items() if isinstance(value, torch.Tensor) and value.dim()}

    def _get_num_items_in_batch(self, batch_samples, device):
        counts = self.scored(batch_samples)
        return None if counts is None else counts.to(device)

    @property
    def _own_loss(self) -> bool:
        """Whether a subclass has a loss of its own, which knows nothing of clients."""
        return type(self).compute_loss is not TrainsClients.compute_loss

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if self._stack is None or not self._stack.is_at_work or not self.model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        losses = self.client_losses(model, inputs, self._step_clients, num_items_in_batch)
        if not self._own_loss:
            self.run.clients.record_loss(losses)
        if return_outputs:
            with torch.no_grad():
                outputs = model(**inputs, **self._forward_options)  # with the logits, as the Trainer's
        return (losses.sum(), outputs) if return_outputs else losses.sum()

    def _clip_grad_norm(self, model):
        return self._stack.clip_gradients(self.args.max_grad_norm).mean()

    def _get_grad_norm(self, model, grad_norm=None):
        return self._stack.clip_gradients(0.0).mean() if grad_norm is None else grad_norm


def _shaped_as(parameter: torch.Tensor, fresh: Any) -> Any:
    """A copy of an optimizer's fresh state, an equal number for each element, of which a parameter now has fewer."""
    if isinstance(fresh, torch.Tensor) and fresh.dim() == parameter.dim():
        return fresh.flatten()[: parameter.numel()].view_as(parameter).clone()
    return copy.deepcopy(fresh)
