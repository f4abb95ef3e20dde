"""FlexLoRA: J. Bai et al., "Federated Fine-tuning of Large Language Models under Heterogeneous Tasks and Client
Resources", NeurIPS 2024, arXiv 2402.11505.

Symbols: client i of rank k_i returns `A_i [k_i, in]`, `B_i [out, k_i]`; the server averages the products,
`P = sum_i w_i B_i A_i`, and keeps the best rank-r part of `P = U S V^T` as the new global pair. A client's best
rank-k part is then the first k rows of A and columns of B.

`P` is never made (stacking.py): with the clients' factors side by side, QR of `B [out, K]` and of `A^T` leaves a core
of at most `min(out, K) x min(in, K)` to decompose, never more than `P` itself.

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

from .base import first_rows
from .stacking import BestPart


class FlexLoRA(BestPart):
    """Each client trains its best rank-k part; the server averages the products and decomposes them anew."""

    def receive(self, state, client, sketch):
        return first_rows(state, client.rank)
