"""What methods share that keep the clients' factors apart until the round ends: `sum_i w_i B_i A_i` is one product,
`B A` with the factors side by side, `B [out, K]`, `A [K, in]`, `K = sum_i k_i`, and is never made.
"""

from itertools import accumulate

import torch

from .base import FlatTensors, Method, zeros_like_pair

ROUNDING = 10  # singular values up to so many units in the last place of the factors' norms count as zero


class Stacking(Method):
    """Gives each client of a cohort rows of a stacked A and columns of a stacked B of its own, for what it returns.

    Only that client fills them, so that sums over processes stack them.
    """

    new_basis = True

    def accumulator(self, state, cohort):
        self._ends = list(accumulate(client.rank for client in cohort))  # of a client's rows, by its position
        shapes = {"weight": (len(cohort),)}
        for module, A in state.A.items():
            shapes[f"{module}.A"] = self._ends[-1], A.shape[1]
            shapes[f"{module}.B"] = state.B[module].shape[0], self._ends[-1]
        return zeros_like_pair(state, shapes)

    def accumulate(self, accumulator, update):
        returned, end = update.returned, self._ends[update.position]
        accumulator["weight"][update.position] += update.weight
        for module, A in returned.A.items():
            rows = slice(end - len(A), end)
            accumulator[f"{module}.A"][rows].add_(A)
            accumulator[f"{module}.B"][:, rows].add_(returned.B[module], alpha=update.weight * returned.scale)


def stacked(accumulator: FlatTensors, module: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The factors of one module, A `[K, in]` and B `[out, K]`, whose product is the average: each client's B times its
    scale and its share of the accepted weight. Used up: the accumulator's own B is divided."""
    return accumulator[f"{module}.A"], accumulator[f"{module}.B"].div_(accumulator["weight"].sum())


def best_pair(
    A: torch.Tensor, B: torch.Tensor, old_A: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The best rank-r part of `B A`, balanced, and the sum of the squared singular values left out.

    Args:
        A, B: the factors, `[K, in]` and `[out, K]`.
        old_A: `[r, in]`, the rows of A where a singular value is zero.

    Returns:
        A `[r, in]` and B `[out, r]` in the type of `old_A`, and the error (a float64 scalar tensor).

    Decomposes in float64, so that what is below the rounding of a float32 adapter is still told from zero.
    """
    # The larger factor first, while nothing of the other is held: the peak is two float64 copies of it.
    if len(B) >= A.shape[1]:
        Q_B, R_B = torch.linalg.qr(B.double())  # [out, n], [n, K]
        Q_A, R_A = torch.linalg.qr(A.mT.double())  # [in, m], [m, K]
    else:
        Q_A, R_A = torch.linalg.qr(A.mT.double())
        Q_B, R_B = torch.linalg.qr(B.double())
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
