"""Whether all that is targeted is trained: each side of each module must move at some client once it can.

A layer that no gradient reaches passes every look at its shape and would be saved, untrained, with the others.
"""

from collections.abc import Callable, Iterable, Sequence

import torch

from ..methods import ClientUpdate
from .part import UpdatePart

Side = tuple[str, str]  # module, and A or B

# A side moves by about (step of the other) * (the other) / (itself) of itself, as the gradients of a product do; where
# that is less than float32 can tell, standing still says nothing.
_VISIBLE = 1e-6


class NeverTrained(ValueError):
    """Layers are targeted and not trained. The text names them."""


class Movement:
    """Looks at updates until every trained side of every module has moved at some client.

    A side that begins at zero, as B does, moves by any gradient. One that does not may move by less than its numbers
    can hold. No gradient reaches a side while the other is zero, so that with one local step A rests in the first
    round; and nothing moves at a learning rate of zero.

    Args:
        modules: all that are targeted.
        trains: the sides that clients train.
        local_steps: of a client in a round.
        full_rate: the learning rate that the schedule is a part of.
    """

    def __init__(self, modules: Iterable[str], trains: Sequence[str], local_steps: int, full_rate: float):
        self._pending: set[Side] = {(module, side) for module in modules for side in trains}
        self._seen: set[str] = set()  # modules of which a side has moved
        self._local_steps, self._full_rate = local_steps, full_rate
        self._forget()

    def _forget(self) -> None:
        self._moved: set[Side] = set()
        self._rested: set[Side] = set()  # though it could have moved
        self._rested_wholly: set[Side] = set()  # as the other side did: at too low a rate that may be rounding

    def at_clients(self) -> UpdatePart:
        """Look at changes before anything is left out of them."""
        return _AtClients(self)

    def at_server(self) -> UpdatePart:
        """Look at updates that came and are finite."""
        return _AtServer(self)

    @property
    def is_watching(self) -> bool:
        """Whether something has yet to move."""
        return bool(self._pending)

    def note(self, update: ClientUpdate) -> ClientUpdate:
        """Look at a client's update, and leave it as it is."""
        left = sorted(self._pending - self._moved)
        if left:
            sides = {"A": update.A, "B": update.B}
            moved = torch.stack([sides[side][module].any() for module, side in left]).tolist()
            self._moved |= {each for each, has in zip(left, moved, strict=True) if has}
            for module, side in (each for each, has in zip(left, moved, strict=True) if not has):
                self._note_rest(update, module, side)
        return update

    def _note_rest(self, update: ClientUpdate, module: str, side: str) -> None:
        received, changes = update.received, {"A": update.A, "B": update.B}
        other = "B" if side == "A" else "A"
        own, beside = getattr(received, side)[module], getattr(received, other)[module]
        step = changes[other].get(module)
        moves = step is not None and bool(step.any())
        if not (beside.any() or (moves and self._local_steps > 1)):
            return
        if not own.any():
            self._rested.add((module, side))
        elif not moves:
            self._rested_wholly.add((module, side))
        elif _norm(step) * _norm(beside + step) > _VISIBLE * _norm(own) ** 2:
            self._rested.add((module, side))

    def judge(self, round: int, rate: float, gather: Callable[[object], list]) -> None:
        """Judge a round that is over, in all processes alike.

        Args:
            rate: the round's learning rate.
            gather: this process's value -> every process's.

        Raises:
            NeverTrained: sides that could move and have not, at any client of this round or an earlier one.
        """
        if not self._pending:
            return
        found = gather((self._moved, self._rested, self._rested_wholly))
        moved, rested, wholly = (set().union(*parts) for parts in zip(*found, strict=True))
        self._pending -= moved
        self._seen |= {module for module, _ in moved}
        wholly = {
            (module, side) for module, side in wholly if module not in self._seen
        }  # where one moves, it is rounding
        self._forget()
        rested = rested | wholly if rate >= self._full_rate / 2 else rested
        if rate > 0 and rested & self._pending:
            raise NeverTrained(_sentence(rested & self._pending, round))


class _AtClients(UpdatePart):
    def __init__(self, movement: Movement):
        self._movement = movement

    def send(self, round, client, update):
        return self._movement.note(update) if self._movement.is_watching and torch.isfinite(update.norm()) else update


class _AtServer(UpdatePart):
    def __init__(self, movement: Movement):
        self._movement = movement

    def take(self, round, client, update):
        return self._movement.note(update)


def _sentence(rested: set[Side], round: int) -> str:
    sides: dict[str, list[str]] = {}
    for module, side in sorted(rested):
        sides.setdefault(module, []).append(side)
    names = [f"{module} ({' and '.join(each)})" for module, each in sides.items()]
    named = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    return (
        f"Expected every targeted layer to be trained, found that after round {round} no client has moved {named}: "
        "leave these layers out of target_modules and start anew in another output_dir; what this run wrote is kept."
    )


def _norm(tensor: torch.Tensor) -> float:
    return torch.linalg.vector_norm(tensor, dtype=torch.float64).item()
