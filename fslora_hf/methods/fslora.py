"""FSLoRA: W. Fang et al., "Federated Sketching LoRA", arXiv 2501.19389.

Symbols: global pair `A [r, in]`, `B [out, r]`; the client's sketch `S = (r / k) sum_{j in I} e_j e_j^T`; its forward
pass is `W0 + s B S A` with `s` the LoRA scale. Since S is zero off I, the client holds `A[I, :]` and `B[:, I]` only,
an ordinary adapter of rank k whose scale is `s r / k`, and gradients of what it holds carry the factor by themselves.
"""

from .base import ClientAdapter, Method
from .sketch import add_lifted, restrict


class FSLoRA(Method):
    """Each client trains a fresh random sketch; the server averages the changes put back at their rows and columns."""

    def receive(self, state, client, sketch):
        pairs = {module: restrict(state.A[module], state.B[module], sketch(module)) for module in state.A}
        A, B = ({module: pair[side] for module, pair in pairs.items()} for side in (0, 1))
        return ClientAdapter(A, B, scale=state.rank / client.rank)

    def rows(self, client, sketch):
        return sketch

    def accumulate(self, accumulator, update):
        accumulator["weight"] += update.weight
        for module in update.A:
            wide = accumulator[f"{module}.A"], accumulator[f"{module}.B"]
            add_lifted(*wide, update.A[module], update.B[module], update.sketch(module), update.weight)
