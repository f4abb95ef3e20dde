"""FedIT: J. Zhang et al., "Towards Building the Federated GPT: Federated Instruction Tuning", arXiv 2305.05644.

Federated averaging of A and of B: every client trains the whole pair, so all clients have the global rank.
"""

from .base import Method, first_rows


class FedIT(Method):
    """Every client trains the whole global pair; the server averages the changes."""

    full_rank_only = True

    def receive(self, state, client, sketch):
        return first_rows(state, state.rank)

    def rows(self, client, sketch):
        return sketch

    def accumulate(self, accumulator, update):
        accumulator["weight"] += update.weight
        for side, changes in (("A", update.A), ("B", update.B)):
            for module, change in changes.items():
                accumulator[f"{module}.{side}"].add_(change, alpha=update.weight)
