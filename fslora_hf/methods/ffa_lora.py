"""FFA-LoRA: Y. Sun et al., "Improving LoRA in Privacy-preserving Federated Learning", ICLR 2024, arXiv 2403.12313.

Symbols: `W0 + s B A` with A frozen at its initial value and B trained from zero. Averaging B alone then averages the
products exactly, `mean_i(B_i A) = mean_i(B_i) A`, and noise on B is not multiplied by noise on A.

Decided here:
- All clients have the global rank, as in the paper. A client that held the first k rows of a frozen A could never
  learn outside their span, and columns beyond the smallest rank would be averaged with zeros of those without them.
- A is part of what every client has beforehand, like the base model (a seed can stand for it), so that only B crosses
  the wire, both ways.
- Since A is no parameter of the local optimizer, neither weight decay nor clipping knows of it; the server's optimizer
  is not given it either.
"""

from .fedit import FedIT


class FFALoRA(FedIT):
    """Every client trains B alone; the server averages the changes of B."""

    trains = ("B",)
