"""FedIT: J. Zhang et al., "Towards Building the Federated GPT: Federated Instruction Tuning", arXiv 2305.05644.

Federated averaging of A and of B: every client trains the whole pair, so all clients have the global rank.
"""

from .base import ClientAdapter, Method


class FedIT(Method):
    """Every client trains the whole global pair; the server averages the changes."""

    full_rank_only = True

    def receive(self, state, client, sketch):
        A = {module: tensor.clone() for module, tensor in state.A.items()}
        return ClientAdapter(A, {module: tensor.clone() for module, tensor in state.B.items()}, scale=1.0)

    def accumulate(self, accumulator, update):
        accumulator["weight"] += update.weight
        for module in update.A:
            accumulator[f"{module}.A"].add_(update.A[module], alpha=update.weight)
            accumulator[f"{module}.B"].add_(update.B[module], alpha=update.weight)
