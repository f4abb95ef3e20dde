"""`per_device_train_clients: auto`: the largest block of clients whose step fits the device, found by trying."""

import logging
import math
import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from datasets import Dataset
from peft import PeftModel

from ..common import host_memory
from ..config.federation import FederatedSketchConfig
from ..data.rows import survey_rows
from ..methods import ClientAdapter, method_class
from ..models.adapter import global_pair
from ..models.stack import ClientStack

logger = logging.getLogger(__name__)


class Meter(Protocol):
    """Measures steps on one device: `room` bytes may be used beyond what was held when the meter was made, and steps
    of up to `limit` bytes may be tried."""

    room: float
    limit: float

    def peak(self, step: Callable[[], None]) -> float | None:
        """Bytes that `step` held at most beyond what was held when the meter was made; None if it ran out of them."""


class CudaMeter:
    """Of a CUDA device. A tenth is left to fragmentation and to what a round holds besides its step."""

    def __init__(self, device: torch.device):
        self._device, self._held = device, torch.cuda.memory_allocated(device)
        free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - self._held
        self.room, self.limit = 0.9 * free, math.inf

    def peak(self, step: Callable[[], None]) -> float | None:
        torch.cuda.reset_peak_memory_stats(self._device)
        try:
            step()
            torch.cuda.synchronize(self._device)
        except torch.OutOfMemoryError:
            return None
        finally:
            torch.cuda.empty_cache()
        return torch.cuda.max_memory_allocated(self._device) - self._held


class HostMeter:
    """Of the machine's memory, on Linux, shared equally by this machine's processes. A fifth is left to others, and no
    step is tried that could take all: it would not be refused but end the process."""

    def __init__(self):
        host_memory.return_freed_memory()
        self._held = host_memory.held_bytes()
        self.limit = host_memory.free_bytes() / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        self.room = 0.8 * self.limit

    def peak(self, step: Callable[[], None]) -> float | None:
        host_memory.return_freed_memory()  # of a larger step, which would be counted as this one's
        host_memory.forget_peak()
        step()
        return host_memory.peak_bytes() - self._held


def meter_of(device: torch.device) -> Meter:
    """The meter of a device.

    Raises:
        ValueError: there is none for this kind of device or system.
    """
    if device.type == "cuda":
        return CudaMeter(device)
    if device.type == "cpu" and host_memory.is_measured():
        return HostMeter()
    raise ValueError(
        f"Expected a CUDA device, or Linux, to measure what a step takes for per_device_train_clients: auto, found "
        f"{device.type} on {platform.system()}: set per_device_train_clients to a number."
    )


def largest_block(peak: Callable[[int], float | None], room: float, most: int, limit: float = math.inf) -> int:
    """The most clients, up to `most`, of which `peak(clients)` is no more than `room`; 0 if one is too many.

    A step takes a part that is the same for any number of clients, and a part for each. The first guess after one
    client counts all that it took as such a part, so that it is rather too low, but two clients are tried if twice as
    much is within `limit`; later guesses follow the last two sizes.
    """
    fits, fits_in, fails = 0, 0.0, most + 1
    guess = 1
    while fits < guess < fails:
        taken = peak(guess)
        if taken is None or taken > room:
            fails, guess = guess, (fits + guess) // 2
            continue
        a_client = max(1.0, (taken - fits_in) / (guess - fits))
        fits, fits_in = guess, taken
        further = int((room - taken) / a_client)
        if fits == 1 and 2 * taken <= limit:
            further = max(1, further)
        guess = min(fits + further, fails - 1)
    return fits


@dataclass(frozen=True)
class LargestStep:
    """The local step that takes most: on the longest rows, with clients of the largest rank.

    Args:
        most: clients that this process may have to train at once.
        rank: the largest of all clients.
        dataset: prepared rows, with the `columns` that a step reads.
        loss: of a batch's inputs, a number whose backward pass takes what that of a step does.
    """

    args: FederatedSketchConfig
    model: PeftModel
    most: int
    rank: int
    dataset: Dataset
    columns: Sequence[str]
    collator: Callable[[list[dict]], dict[str, torch.Tensor]]
    loss: Callable[[dict[str, torch.Tensor]], torch.Tensor]

    def rows(self) -> list[dict]:
        """The longest, of as many clients as may be tried."""
        return longest_rows(self.dataset, self.columns, self.most * self.args.per_device_train_batch_size)

    def take(self, clients: int, rows: list[dict]) -> None:
        """Compute and hold what a local step of a block does, on the first of the `rows`, with clients that are all
        zero; the model is left as it was."""
        args, method = self.args, method_class(self.args.method)
        stack = ClientStack(self.model, clients, self.rank, trains=method.trains, beside_global=method.beside_global)
        stack.attach()
        try:
            stack.load([_blank(*global_pair(self.model), self.rank) for _ in range(clients)])
            batch = self.collator(rows[: clients * args.per_device_train_batch_size])
            inputs = {name: tensor.to(args.device) for name, tensor in batch.items()}
            self.model.train()
            devices = [args.device] if args.device.type == "cuda" else []
            with torch.random.fork_rng(devices), stack.at_work(inputs["input_ids"].numel()):
                self.loss(inputs).backward()
            # An optimizer's two moments of every number that is trained.
            _ = [torch.zeros_like(p) for p in stack.parameters() if p.grad is not None for _ in range(2)]
        finally:
            stack.detach()


def fit_block(step: LargestStep, meter: Meter | None = None) -> int:
    """The most clients of this process whose step fits its device.

    Raises:
        ValueError: not even one client fits, or the device cannot be measured.
    """
    args = step.args
    meter = meter or meter_of(args.device)
    taken: dict[int, float | None] = {}

    def peak(clients: int) -> float | None:
        taken[clients] = meter.peak(partial(step.take, clients, rows))
        return taken[clients]

    if args.activation_checkpointing:
        _checkpoint_activations(step.model, args.activation_checkpointing_kwargs)
    rows = step.rows()
    block = largest_block(peak, meter.room, step.most, meter.limit)
    if block == 0:
        found = "more than that" if taken[1] is None else f"{taken[1] / 1e9:.2f} GB"
        raise ValueError(
            f"Expected a step of one client to fit into the {meter.room / 1e9:.2f} GB of memory at hand, found that "
            f"it takes {found}: lower per_device_train_batch_size or max_length, or turn on activation_checkpointing."
        )
    text = "%d clients of up to %d share a step: it takes %.2f GB of %.2f GB at hand."
    logger.info(text, block, step.most, taken[block] / 1e9, meter.room / 1e9)
    return block


def _checkpoint_activations(model: PeftModel, options: dict[str, Any] | None) -> None:
    """Do now what `Trainer.train` will do when it begins (transformers 5.23.0)."""
    options = dict(options or {})
    own = {name: options.pop(name, default) for name, default in (("every_n_layers", 1), ("offload", False))}
    model.activation_checkpointing_enable(activation_checkpointing_kwargs=options or None, **own)


def longest_rows(dataset: Dataset, columns: Sequence[str], count: int) -> list[dict]:
    """The `count` longest rows of a tokenised data set, from the longest again if it has fewer."""
    order = np.argsort(-survey_rows(dataset).tokens, kind="stable")[:count]
    read = dataset.select_columns(list(columns))
    return [read[int(row)] for row in np.resize(order, count)]


def _blank(A: dict[str, torch.Tensor], B: dict[str, torch.Tensor], rank: int) -> ClientAdapter:
    return ClientAdapter(
        {name: tensor.new_zeros(rank, tensor.shape[1]) for name, tensor in A.items()},
        {name: tensor.new_zeros(tensor.shape[0], rank) for name, tensor in B.items()},
        1.0,
    )
