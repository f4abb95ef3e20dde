"""What methods share that keep the clients' factors apart until the round ends: `sum_i w_i B_i A_i` is one product,
`B A` with the factors side by side, `B [out, K]`, `A [K, in]`, `K = sum_i k_i`, and is never made.
"""

from collections.abc import Sequence

import torch

from .base import FlatTensors, Method, zeros_like_pair

ROUNDING = 10  # singular values up to so many units in the last place of the factors' norms count as zero


class Stacking(Method):
    """Gives each client of a cohort a slot of its own for the pair it returns and its weight.

    Only that client fills it, so that sums over processes stack them.
    """

    new_basis = True

    def accumulator(self, state, cohort):
        shapes = {"weight": (len(cohort),)}
        for module, A in state.A.items():
            out = state.B[module].shape[0]
            for position, client in enumerate(cohort):
                shapes[f"{module}.A.{position}"] = client.rank, A.shape[1]
                shapes[f"{module}.B.{position}"] = out, client.rank
        return zeros_like_pair(state, shapes)

    def accumulate(self, accumulator, update):
        returned, slot = update.returned, update.position
        accumulator["weight"][slot] += update.weight
        for module, A in returned.A.items():
            accumulator[f"{module}.A.{slot}"].add_(A)
            accumulator[f"{module}.B.{slot}"].add_(returned.B[module], alpha=update.weight * returned.scale)


def stacked(accumulator: FlatTensors, module: str) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Factors of all clients in one module, A `[k_i, in]` and B `[out, k_i]` times its scale and its share of the
    accepted weight."""
    weights = accumulator["weight"]
    slots, total = range(len(weights)), weights.sum()
    A = [accumulator[f"{module}.A.{slot}"] for slot in slots]
    return A, [accumulator[f"{module}.B.{slot}"] / total for slot in slots]


def best_pair(
    A: Sequence[torch.Tensor], B: Sequence[torch.Tensor], old_A: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The best rank-r part of `sum_i B_i A_i`, balanced, and the sum of the squared singular values left out.

    Args:
        A, B: the factors, `[k_i, in]` and `[out, k_i]`.
        old_A: `[r, in]`, the rows of A where a singular value is zero.

    Returns:
        A `[r, in]` and B `[out, r]` in the type of `old_A`, and the error (a float64 scalar tensor).

    Decomposes in float64, so that what is below the rounding of a float32 adapter is still told from zero.
    """
    Q_A, R_A = torch.linalg.qr(torch.cat([part.mT for part in A], dim=1).double())  # [in, m], [m, K]
    Q_B, R_B = torch.linalg.qr(torch.cat(list(B), dim=1).double())  # [out, n], [n, K]
    U, S, Vh = torch.linalg.svd(R_B @ R_A.mT, full_matrices=False)
    rank = min(len(old_A), len(S))
    root = S[:rank].sqrt()
    rows, columns = root[:, None] * (Vh[:rank] @ Q_A.mT), Q_B @ U[:, :rank] * root
    largest = rows.gather(1, rows.abs().argmax(dim=1, keepdim=True))
    sign = torch.where(largest < 0, -1.0, 1.0).double()
    smallest = ROUNDING * torch.finfo(old_A.dtype).eps * torch.linalg.norm(R_A) * torch.linalg.norm(R_B)
    zero = S[:rank] <= smallest
    new_A, new_B = old_A.detach().clone(), old_A.new_zeros(Q_B.shape[0], len(old_A))
    new_A[:rank] = torch.where(zero[:, None], new_A[:rank], (rows * sign).to(new_A.dtype))
    new_B[:, :rank] = torch.where(zero, 0.0, (columns * sign[:, 0]).to(new_B.dtype))
    return new_A, new_B, S[rank:].square().sum()
