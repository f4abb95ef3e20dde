"""What methods share that keep the clients' factors apart until the round ends: `sum_i w_i B_i A_i` is one product,
`B A` with the factors side by side, `B [out, K]`, `A [K, in]`, `K = sum_i k_i`, and is never made.
"""

from collections.abc import Sequence
from dataclasses import dataclass
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
        # Where each client's rows end is the round's own, and made anew in every process with the accumulator.
        self._ends = list(accumulate(client.rank for client in cohort))
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


class BestPart(Stacking):
    """Keeps the best rank-r part of the stack, alone or with what there was, as the new global pair.

    `truncation_error` in the ledger is what that gives up, in squared Frobenius norm over all modules.
    """

    def __init__(self):
        self._truncation_error = 0.0

    def factors(self, A: torch.Tensor, B: torch.Tensor, old_A: torch.Tensor, old_B: torch.Tensor):
        """The factors of what is to be kept, several A `[k, in]` and B `[out, k]`: the stack's."""
        return [A], [B]

    def finish(self, state, accumulator):
        A, B, errors = {}, {}, []
        if accumulator["weight"].sum().item() == 0.0:
            self._truncation_error = 0.0
            return None
        for module, old_A in state.A.items():
            old_B = state.B[module]
            new_A, new_B, error = best_pair(*self.factors(*stacked(accumulator, module), old_A, old_B), old_A)
            A[module], B[module] = new_A.sub_(old_A), new_B.sub_(old_B)
            errors.append(error)
        self._truncation_error = torch.stack(errors).sum().item()
        return A, B

    def notes(self):
        return {"truncation_error": self._truncation_error}


def stacked(accumulator: FlatTensors, module: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The factors of one module, A `[K, in]` and B `[out, K]`, whose product is the average: each client's B times its
    scale and its share of the accepted weight. Used up: the accumulator's own B is divided."""
    return accumulator[f"{module}.A"], accumulator[f"{module}.B"].div_(accumulator["weight"].sum())


def best_pair(
    A: Sequence[torch.Tensor], B: Sequence[torch.Tensor], old_A: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The best rank-r part of `sum_i B_i A_i`, balanced, and the sum of the squared singular values left out.

    Args:
        A, B: the factors, `[k_i, in]` and `[out, k_i]`.
        old_A: `[r, in]`, the rows of A where a singular value is zero.

    Returns:
        A `[r, in]` and B `[out, r]` in the type of `old_A`, and the error (a float64 scalar tensor).

    Decomposes in float64, so that what is below the rounding of a float32 adapter is still told from zero. Holds one
    float64 copy of each factor.
    """
    Q_A, R_A = _decompose(A)
    Q_B, R_B = _decompose([part.mT for part in B])
    U, S, Vh = torch.linalg.svd(R_B @ R_A.mT, full_matrices=False)
    rank = min(len(old_A), len(S))
    root = S[:rank].sqrt()
    rows, columns = Q_A.times(Vh[:rank].mT * root).mT, Q_B.times(U[:, :rank] * root)
    largest = rows.gather(1, rows.abs().argmax(dim=1, keepdim=True))
    sign = torch.where(largest < 0, -1.0, 1.0).double()
    smallest = ROUNDING * torch.finfo(old_A.dtype).eps * torch.linalg.norm(R_A) * torch.linalg.norm(R_B)
    zero = S[:rank] <= smallest
    new_A, new_B = old_A.detach().clone(), old_A.new_zeros(len(columns), len(old_A))
    new_A[:rank] = torch.where(zero[:, None], new_A[:rank], (rows * sign).to(new_A.dtype))
    new_B[:, :rank] = torch.where(zero, 0.0, (columns * sign[:, 0]).to(new_B.dtype))
    return new_A, new_B, S[rank:].square().sum()


@dataclass(frozen=True)
class _Orthonormal:
    """A matrix of orthonormal columns `[n, m]` as a product of m reflections, which takes no memory of its own."""

    reflections: torch.Tensor
    factors: torch.Tensor

    def times(self, other: torch.Tensor) -> torch.Tensor:
        """Its product `[n, columns]` with `other` `[m, columns]`."""
        padded = other.new_zeros(other.shape[1], len(self.reflections)).mT  # column by column, as LAPACK wants it
        padded[: len(other)] = other
        return torch.ormqr(self.reflections, self.factors, padded)


def _decompose(rows: Sequence[torch.Tensor]) -> tuple[_Orthonormal, torch.Tensor]:
    """QR in float64 of the matrix whose columns, of length n, are the given rows `[k_i, n]`: Q `[n, m]`, R `[m, K]`,
    m the smaller of n and K."""
    ends = list(accumulate(len(part) for part in rows))
    wide = rows[0].new_empty(ends[-1], rows[0].shape[1], dtype=torch.float64)
    for part, end in zip(rows, ends, strict=True):
        wide[end - len(part) : end] = part
    factors = wide.new_empty(min(wide.shape))
    torch.geqrf(wide.mT, out=(wide.mT, factors))  # in place
    m = len(factors)
    return _Orthonormal(wide.mT[:, :m], factors), wide.mT[:m].triu()
