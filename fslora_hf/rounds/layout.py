"""How the clients of a round are spread over processes and steps. It changes nothing but rounding."""

from collections.abc import Iterator
from dataclasses import dataclass

from .plan import ClientPlan, RoundPlan


@dataclass(frozen=True)
class Layout:
    """Blocks of clients on processes: block b trains on process `b % processes`, in wave `b // processes`.

    Attributes:
        clients_per_round: the cohort's size.
        local_steps: optimizer steps of a block.
        block_size: clients one process trains in the same step.
        processes, process: how many there are, and which one this is.
    """

    clients_per_round: int
    local_steps: int
    block_size: int
    processes: int = 1
    process: int = 0

    @property
    def waves(self) -> int:
        """Blocks that each process trains one after the other; the last may be idle on some processes."""
        return -(-self.clients_per_round // (self.block_size * self.processes))

    @property
    def even_block(self) -> int:
        """The smallest block with which a round takes no more waves."""
        return -(-self.clients_per_round // (self.waves * self.processes))

    @property
    def steps_per_round(self) -> int:
        return self.waves * self.local_steps

    def block(self, plan: RoundPlan, wave: int) -> tuple[ClientPlan, ...]:
        """The clients this process trains in `wave`, none if it idles.

        Clients of similar rank share a block, since a block's products are as wide as its largest rank.
        """
        start = (wave * self.processes + self.process) * self.block_size
        return tuple(sorted(plan.clients, key=lambda client: client.rank)[start : start + self.block_size])

    def clients_in_wave(self, wave: int) -> int:
        """Clients that train in `wave` on all processes together."""
        a_wave = self.block_size * self.processes
        return min(a_wave, self.clients_per_round - wave * a_wave)

    def batches(self, plan: RoundPlan, micro_batch: int) -> Iterator[list[int]]:
        """The round's micro-batches on this process, client by client: rows of the training data set.

        Each holds `micro_batch` rows of every client of the block; an idle slot's are empty.
        """
        for wave in range(self.waves):
            block = self.block(plan, wave)
            examples = plan.clients[0].example_ids.shape[1]
            for step in range(self.local_steps):
                for start in range(0, examples, micro_batch):
                    rows = [client.example_ids[step, start : start + micro_batch] for client in block]
                    yield [row for part in rows for row in part.tolist()]
