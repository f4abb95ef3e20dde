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
        """Blocks that each process trains one after the other; some may have none of their own in the last wave."""
        return -(-self.clients_per_round // (self.block_size * self.processes))

    @property
    def even_block(self) -> int:
        """The smallest block with which a round takes no more waves."""
        return -(-self.clients_per_round // (self.waves * self.processes))

    @property
    def steps_per_round(self) -> int:
        return self.waves * self.local_steps

    def block(self, plan: RoundPlan, wave: int) -> tuple[ClientPlan, ...]:
        """The clients this process trains in `wave`, none if there are no more."""
        return self._block(plan, wave * self.processes + self.process)

    def seated(self, plan: RoundPlan, wave: int) -> tuple[ClientPlan, ...]:
        """The clients in this process's slots in `wave`: its block or, where it has none, one that it borrows.

        What comes of a borrowed block counts for nothing. It is trained so that all processes make the same calls in
        every step, in which those that share a base would wait for each other. Lent is the cohort's last block: it
        trains in this very wave, and no block has fewer clients.
        """
        last = (self.clients_per_round - 1) // self.block_size
        return self._block(plan, min(wave * self.processes + self.process, last))

    def _block(self, plan: RoundPlan, number: int) -> tuple[ClientPlan, ...]:
        """Clients of similar rank share a block, since a block's products are as wide as its largest rank."""
        start = number * self.block_size
        return tuple(sorted(plan.clients, key=lambda client: client.rank)[start : start + self.block_size])

    def clients_in_wave(self, wave: int) -> int:
        """Clients that train in `wave` on all processes together."""
        a_wave = self.block_size * self.processes
        return min(a_wave, self.clients_per_round - wave * a_wave)

    def batches(self, plan: RoundPlan, micro_batch: int) -> Iterator[list[int]]:
        """The round's micro-batches on this process, client by client: rows of the training data set.

        Each holds `micro_batch` rows of every client in this process's slots.
        """
        for wave in range(self.waves):
            seated = self.seated(plan, wave)
            examples = plan.clients[0].example_ids.shape[1]
            for step in range(self.local_steps):
                for start in range(0, examples, micro_batch):
                    rows = [client.example_ids[step, start : start + micro_batch] for client in seated]
                    yield [row for part in rows for row in part.tolist()]
