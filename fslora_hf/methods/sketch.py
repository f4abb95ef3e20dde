"""Sketches: the random rank-k part of a rank-r adapter that a client trains for one round.

W. Fang et al., "Federated Sketching LoRA", arXiv 2501.19389. The paper's sketch of a client is the diagonal matrix
``S = (r / k) * sum_{j in I} e_j e_j^T`` with `I` a uniformly random k-subset of ``{0..r-1}``, so that ``E[S]`` is the
identity. Here `I` is the index array; the factor ``r / k`` is the client adapter's `scale`.
"""

import numpy as np
import torch

from ..common.draws import permutation_prefix


def draw(seed: int, round: int, client_id: int, module: str, r: int, k: int) -> np.ndarray:
    """The sketch of `module` for a client in a round: sorted int64 indices `[k]`, uniform over the k-subsets of r.

    A and B of a module share it. Pass the same `module` for all modules to share one sketch across a model.
    """
    if not 1 <= k <= r:
        raise ValueError(f"Expected a client rank from 1 to the global rank {r}, found {k}.")
    return np.sort(permutation_prefix(r, k, seed, "sketch", round, client_id, module))


def restrict(A: torch.Tensor, B: torch.Tensor, sketch: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """What a client receives of the global pair `A [r, in]`, `B [out, r]`: copies `A [k, in]` and `B [out, k]`."""
    index = torch.from_numpy(sketch).to(A.device)
    return A.index_select(0, index), B.index_select(1, index)


def lift(A: torch.Tensor, B: torch.Tensor, sketch: np.ndarray, r: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A client's pair `A [k, in]`, `B [out, k]` back at its rows and columns of zeros: `A [r, in]`, `B [out, r]`."""
    wide_A, wide_B = A.new_zeros(r, A.shape[1]), B.new_zeros(B.shape[0], r)
    add_lifted(wide_A, wide_B, A, B, sketch)
    return wide_A, wide_B


def add_lifted(
    wide_A: torch.Tensor,
    wide_B: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    sketch: np.ndarray,
    weight: float = 1.0,
) -> None:
    """Add `weight` times the lifted pair to `wide_A [r, in]` and `wide_B [out, r]` in place, at the cost of rank k."""
    index = torch.from_numpy(sketch).to(wide_A.device)
    wide_A.index_add_(0, index, A.to(wide_A.dtype), alpha=weight)
    wide_B.index_add_(1, index, B.to(wide_B.dtype), alpha=weight)
