"""HetLoRA: Y. J. Cho et al., "Heterogeneous LoRA for Federated Fine-tuning of On-Device Foundation Models",
EMNLP 2024, arXiv 2401.06432.

Symbols: global pair `A [r, in]`, `B [out, r]`. A client of rank k receives `A[:k]` and `B[:, :k]` (truncation) and
returns a trained pair. The server pads what clients return with zeros to rank r and averages A and B, client i with a
part in proportion to the norm of its product, `||B_i A_i||_F` (sparsity-weighted aggregation).

Decided here:
- The norm is over all modules together, so that a client has one part in all of them, and multiplies the client's
  weight in the plan. It is read from k x k Gram matrices: `||B A||_F^2 = sum((B^T B) * (A A^T))`.
- What is averaged are adapters, not changes, so clients that lack a row pull it towards zero. The server's optimizer
  is given the aggregate less the global pair; plain averaging makes the aggregate the global pair.
- Rows and columns that no client of the round held stay as they are. Padding them with zeros alone would make both
  sides zero, and no gradient would ever reach them again.
- A client whose product is zero (B starts at zero; the learning rate may be, too) has no part in the average. If that
  is so for all of them, the global pair stays as it is.
- All clients compute with the global adapter's scale, without which averaging their factors would mean nothing.
- The paper's self-pruning of client ranks is left for later: ranks are those of the plan.
"""

import numpy as np
import torch

from .base import ClientAdapter, Method, first_rows, zeros_like_pair


class HetLoRA(Method):
    """Each client trains the first rows and columns; the server averages padded adapters, weighted by their norms."""

    def receive(self, state, client, sketch):
        return first_rows(state, client.rank)

    def rows(self, client, sketch):
        return lambda module: np.arange(client.rank)

    def weigh(self, update):
        return update.weight * product_norm(update.returned)

    def accumulator(self, state, cohort):
        """As of any average, and the weight of the clients that held each row, `[r]`."""
        return zeros_like_pair(state, {"held": (state.rank,), **self.mean_shapes(state)})

    def accumulate(self, accumulator, update):
        weight, returned = self.weigh(update), update.returned
        accumulator["weight"] += weight
        for module, A in returned.A.items():
            rank = A.shape[0]
            accumulator[f"{module}.A"][:rank].add_(A, alpha=weight)
            accumulator[f"{module}.B"][:, :rank].add_(returned.B[module], alpha=weight)
        accumulator["held"][:rank] += weight

    def finish(self, state, accumulator):
        mean = super().finish(state, accumulator)
        if mean is None:
            return None
        held = (accumulator["held"] > 0).to(accumulator["held"].dtype)
        A = {module: (mean[0][module] - tensor) * held[:, None] for module, tensor in state.A.items()}
        return A, {module: (mean[1][module] - tensor) * held for module, tensor in state.B.items()}


def product_norm(adapter: ClientAdapter) -> float:
    """Frobenius norm of `B A` over all modules, in float64: differences of large products would drown in float32."""
    squares = []
    for module, A in adapter.A.items():
        A, B = A.double(), adapter.B[module].double()
        squares.append(((B.mT @ B) * (A @ A.mT)).sum())
    return torch.stack(squares).sum().clamp(min=0.0).sqrt().item()
