"""FLoRA: Z. Wang et al., "FLoRA: Federated Fine-Tuning Large Language Models with Heterogeneous Low-Rank Adaptations",
NeurIPS 2024, arXiv 2409.05976. The FSLoRA paper calls it FedStackLoRA.

Symbols: every round client i starts a new adapter of rank k_i, A_i drawn at random and B_i zero, and trains it. The
server stacks what comes back, `A [K, in]` and `B [out, K]` with `K = sum_i k_i`, so that `B A = sum_i w_i s_i B_i A_i`
exactly, and folds it into the base: `W <- W + B A`. Every client does the same with the stack it is sent.

Two forms are here. `flora` folds into the base's own weights, which must not be quantized; a checkpoint then holds the
changed weights beside the adapter (models/folding.py), which stays as it was: B is zero in a new one. The ledger's
`fold_error` is what the base's own precision (bfloat16, say) takes from a fold. `flora_residual` leaves the base be:
the global adapter, of bounded rank r, is the sum of all rounds, cut back to its best rank-r part after each, and
`truncation_error` is what that cut gives up. Both are squared Frobenius norms. In both forms clients train beside the
global adapter, not in its place.

Decided here:
- `s_i` is the scale that a plain adapter of rank k_i has under the run's lora_alpha: r/k_i times the global adapter's.
  With rsLoRA the factor is the same, as it is for sketches, so that methods are compared at the same scale.
- New rows of A are uniform on +-1/sqrt(in), as PEFT draws them; a seed stands for them and nothing of it is sent.
- Both forms need plain averaging on the server: each round's directions are new, and what is folded is folded.
- Bytes down, `flora`: all clients need all stacks, whoever trained. A client of a share p of the rounds fetches those
  of 1/p rounds when it comes, or the changed weights if these are smaller; the ledger counts that mean. The paper has
  all clients take part, so p = 1. Stacks count whole, also with upload_top_k. `flora_residual` sends the residual, of
  rank r.
- In the residual form, where a singular value is zero A keeps its row and B has none, as in flexlora.py.
"""

import torch

from .base import ClientAdapter, Method
from .stacking import BestPart, Stacking, stacked


class FLoRA(Stacking):
    """Each client trains a new adapter beside what is learned; the server folds the stack of all into the base."""

    beside_global = True
    folds = True

    def receive(self, state, client, sketch):
        A, B = {}, {}
        for module, like in state.A.items():
            rows = torch.from_numpy(client.fresh_rows(module, like.shape[1]))
            A[module] = rows.to(device=like.device, dtype=like.dtype)
            B[module] = torch.zeros_like(state.B[module][:, : client.rank])
        return ClientAdapter(A, B, scale=state.rank / client.rank)

    def finish(self, state, accumulator):
        if accumulator["weight"].sum().item() == 0.0:
            return None
        A, B = {}, {}
        for module in state.A:
            A[module], B[module] = stacked(accumulator, module)
        return A, B

    def bytes_moved(self, state, client):
        up = super().bytes_moved(state, client)[1]
        stack = up // client.rank * client.cohort_rank
        return round(min(stack / client.participation, state.dense_bytes)), up


class FLoRAResidual(BestPart, FLoRA):
    """FLoRA on a base that cannot be changed: what is learned stays an adapter of the global rank."""

    folds = False

    def factors(self, A, B, old_A, old_B):
        return [old_A, A], [old_B, B]

    def bytes_moved(self, state, client):
        up = Method.bytes_moved(self, state, client)[1]
        return up // client.rank * state.rank, up
