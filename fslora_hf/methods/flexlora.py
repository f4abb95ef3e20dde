"""FlexLoRA: J. Bai et al., "Federated Fine-tuning of Large Language Models under Heterogeneous Tasks and Client
Resources", NeurIPS 2024, arXiv 2402.11505.

Symbols: client i of rank k_i returns `A_i [k_i, in]`, `B_i [out, k_i]`; the server averages the products,
`P = sum_i w_i B_i A_i`, and keeps the best rank-r part of `P = U S V^T` as the new global pair. A client's best
rank-k part is then the first k rows of A and columns of B.

`P` is never made. With the clients' factors side by side, `P = B A` for `B [out, K]`, `A [K, in]`, `K = sum_i k_i`;
QR of `B` and of `A^T` leaves a core of at most `min(out, K) x min(in, K)` to decompose, never more than `P` itself.

Decided here:
- Balanced factors, `B = U sqrt(S)` and `A = sqrt(S) V^T`, singular values descending. Of the two signs of a singular
  pair the one that makes the largest entry of A's row positive.
- Where a singular value is zero, B's column is zero and A's row stays what it was before the round. With both sides
  zero no gradient would ever reach the direction again; this way it is as a direction of a new adapter is. `P = 0`
  (B starts at zero and nothing was learned) thus leaves the pair as it is. A singular value counts as zero below the
  rounding that the adapter's own precision puts into the product.
- The first round hands out the first rows of the initial pair as it is, with B zero: there is no product to decompose.
- The server replaces the global pair, in a basis of this round's own. A step of another length than one, or moments
  of earlier rounds, would mix coordinates of different bases, so the server's optimizer must be plain averaging.
- A cohort's small ranks bound the new pair's rank by `sum_i k_i`: what it cannot hold of the old pair is given up, as
  in the paper. `truncation_error` in the ledger is what the rank r gives up of P, in squared Frobenius norm.
"""

from collections.abc import Sequence

import torch

from .base import Method, first_rows, zeros_like_pair

ROUNDING = 10  # singular values up to so many units in the last place of the factors' norms count as zero


class FlexLoRA(Method):
    """Each client trains its best rank-k part; the server averages the products and decomposes them anew."""

    new_basis = True

    def __init__(self):
        self._truncation_error = 0.0

    def receive(self, state, client, sketch):
        return first_rows(state, client.rank)

    def accumulator(self, state, cohort):
        """A slot for each client's pair and weight; a client fills its own, so that sums over processes stack them."""
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

    def finish(self, state, accumulator):
        weights, errors = accumulator["weight"], []
        total = weights.sum().item()
        if total == 0.0:
            self._truncation_error = 0.0
            return None
        A, B, slots = {}, {}, range(len(weights))
        for module, old_A in state.A.items():
            parts_A = [accumulator[f"{module}.A.{slot}"] for slot in slots]
            parts_B = [accumulator[f"{module}.B.{slot}"] / total for slot in slots]
            new_A, new_B, error = best_pair(parts_A, parts_B, old_A)
            A[module], B[module] = new_A.sub_(old_A), new_B.sub_(state.B[module])
            errors.append(error)
        self._truncation_error = torch.stack(errors).sum().item()
        return A, B

    def notes(self):
        return {"truncation_error": self._truncation_error}


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
