"""Top-k compression of what a client sends: the largest numbers of its change, and their places."""

import math
from dataclasses import replace
from fractions import Fraction

import torch

from ..methods import Method
from .feedback import ErrorFeedback
from .part import UpdatePart


class TopK(UpdatePart):
    """Keep a share of each client's change: of A and B of all modules together, the numbers largest in size.

    With error feedback, what is left out waits on the client, is added to its change when it next takes part, and is
    sent once it is large enough (S. U. Stich et al., "Sparsified SGD with Memory", arXiv 1809.07599). It is kept by
    the rows of the global A and columns of the global B that it is meant for, so a client whose sketch leaves some of
    them out this time keeps those for later. What it left out of an update that the server refused is void.

    Args:
        share: of the numbers of a change, above 0 and at most 1; rounded up to whole numbers.
        method: says which rows a client's are.
        feedback: what clients have left out so far; None to forget it.
    """

    def __init__(self, share: float, method: Method, feedback: ErrorFeedback | None = None):
        self.share, self._method, self._feedback = share, method, feedback

    @torch.no_grad()
    def send(self, round, client, update):
        """The update with zeros where nothing is sent. What is not finite counts as largest, and is seen."""
        if self._feedback is None:
            return replace(update, **dict(zip("AB", self._largest(update.A, update.B), strict=True)))
        find = self._method.rows(client, client.sketch)
        rows = {module: find(module) for module in {**update.A, **update.B}}  # each drawn once
        waiting = self._feedback.take(client.client_id, round)
        for module in rows:
            waiting.add(module, rows[module], update.A.get(module), update.B.get(module))
        A, B = (
            {m: waiting.part(side, m, rows[m]).to(change.device) for m, change in given.items()}
            for side, given in (("A", update.A), ("B", update.B))
        )
        sent = self._largest(A, B)
        for module in rows:
            waiting.subtract(module, rows[module], sent[0].get(module), sent[1].get(module))
        self._feedback.keep(client.client_id, round, waiting)
        return replace(update, A=sent[0], B=sent[1])

    def _largest(self, *sides: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
        """Copies of the tensors with zeros in all but the largest places."""
        flat = torch.cat([tensor.reshape(-1) for side in sides for tensor in side.values()])
        kept = flat.abs().topk(kept_numbers(flat.numel(), self.share), sorted=False).indices
        sparse = torch.zeros_like(flat)
        sparse[kept] = flat[kept]
        pieces = iter(sparse.split([tensor.numel() for side in sides for tensor in side.values()]))
        return [{module: next(pieces).view(tensor.shape) for module, tensor in side.items()} for side in sides]

    def bytes_up(self, size, element_size):
        """Bytes of an update that would take `size` bytes whole.

        The numbers that are sent, and 4 bytes for the place of each or one bit for every place there is, whichever is
        less; or the whole update where that is least.
        """
        numbers = size // element_size
        kept = kept_numbers(numbers, self.share)
        return min(kept * element_size + min(list_bytes(numbers, kept), mask_bytes(numbers)), size)

    def settle(self, round, total, refused):
        """Forget what clients had left out before their part in this round, or of an update that was refused."""
        if self._feedback is not None:
            self._feedback.close_round(round, refused)


def list_bytes(numbers: int, kept: int) -> int:
    """Bytes of the places of `kept` out of so many numbers, each by itself."""
    return (4 if numbers < 2**32 else 8) * kept


def mask_bytes(numbers: int) -> int:
    """Bytes of a bit for each of so many numbers."""
    return math.ceil(numbers / 8)


def kept_numbers(numbers: int, share: float) -> int:
    """How many of so many numbers a share is, rounded up."""
    # As it is written in decimals: 0.07 of 100 is 7, and not the 8 that 7.000000000000001 would be rounded up to.
    return math.ceil(Fraction(str(share)) * numbers)
