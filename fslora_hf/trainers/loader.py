"""The data loader that walks a run's plan: the batches of a round, on one process."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from ..models.joined_rows import StepCost, join_rows
from ..rounds.layout import Layout
from ..rounds.plan import RoundPlan


class RoundBatches:
    """Batch sampler of one round, chosen by `round`: the rows of each micro-batch."""

    def __init__(self, plan: Callable[[int], RoundPlan], layout: Layout, micro_batch: int):
        self._plan, self._layout, self.micro_batch = plan, layout, micro_batch
        self.round = 0

    def __iter__(self) -> Iterator[list[int]]:
        return self._layout.batches(self._plan(self.round), self.micro_batch)

    def __len__(self) -> int:
        examples = self._plan(self.round).clients[0].example_ids.shape[1]
        return self._layout.steps_per_round * -(-examples // self.micro_batch)


class RoundLoader(DataLoader):
    """A plain DataLoader over planned batches. The trainer's epoch is the round.

    It has a generator of its own: making an iterator of a loader draws from its generator, and drawing from the global
    one would move the numbers that dropout sees.
    """

    def __init__(
        self,
        dataset: Dataset,
        batches: RoundBatches,
        collator: Callable[[list], dict],
        cost: StepCost | None = None,
        **options: Any,
    ):
        super().__init__(
            dataset,
            batch_sampler=batches,
            collate_fn=_BlockCollator(collator, batches.micro_batch, cost),
            generator=torch.Generator(),
            **options,
        )

    def set_epoch(self, epoch: int) -> None:
        self.batch_sampler.round = epoch


class _BlockCollator:
    """Collates rows as `collator` does, each client's joined where that pays.

    Adds to each batch how many `clients` it has, and how many `tokens` that are no padding.
    """

    def __init__(self, collator: Callable[[list], dict], micro_batch: int, cost: StepCost | None):
        self._collator, self._micro_batch, self._cost = collator, micro_batch, cost

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        clients, batch = len(rows) // self._micro_batch, self._collator(rows)
        tokens = batch["attention_mask"].sum()
        if self._cost is not None:
            batch = join_rows(batch, clients, self._cost)
        return {**batch, "clients": torch.tensor(clients), "tokens": tokens}
