"""All that happens to updates between clients' local steps and the server's, in the order in which it happens."""

from collections.abc import Collection, Iterator, Sequence
from typing import Any, Protocol

from ..methods import ClientUpdate, FlatTensors, Method, SketchedClient
from .bounds import CheckFinite
from .feedback import ErrorFeedback
from .movement import Movement
from .part import UpdatePart
from .top_k import TopK


class UpdateSettings(Protocol):
    """The part of a run's settings that its updates depend on."""

    upload_top_k: float | None


def parts_of(
    settings: UpdateSettings,
    method: Method,
    movement: Movement,
    feedback: ErrorFeedback | None = None,
    bounds: Sequence[UpdatePart] = (),
    own: Sequence[UpdatePart] = (),
) -> tuple[UpdatePart, ...]:
    """The parts of a run, the same in the simulator, on a federation's server and on its nodes.

    Args:
        movement: watches whether all layers are trained.
        feedback: what clients have left out of their updates; None to forget it.
        bounds: on norms, as a federation's server has them.
        own: a user's.
    """
    thinned = settings.upload_top_k is not None
    parts = (
        movement.at_clients() if thinned else None,  # a layer's part may be left out below
        TopK(settings.upload_top_k, method, feedback) if thinned else None,
        CheckFinite(),
        None if thinned else movement.at_server(),
        *bounds,
        *own,
    )
    return tuple(part for part in parts if part is not None)


class Pipeline:
    """The parts of a run, each place run in their order: see `UpdatePart`.

    The simulator runs all three places, a node `send` alone, a federation's server `take` and `settle`.
    """

    def __init__(self, parts: Sequence[UpdatePart] = ()):
        self.parts = tuple(parts)

    def send(self, round: int, client: SketchedClient, update: ClientUpdate) -> ClientUpdate:
        """What a client sends of its change."""
        for part in self.parts:
            update = part.send(round, client, update)
        return update

    def take(self, round: int, client: SketchedClient, update: ClientUpdate) -> ClientUpdate:
        """What is folded of an update that came.

        Raises:
            RefusedUpdate: nothing is, since a part refuses it.
        """
        for part in self.parts:
            update = part.take(round, client, update)
        return update

    def settle(self, round: int, total: FlatTensors, refused: Collection[int]) -> None:
        """Let every part change the sum of all updates, in place."""
        for part in self.parts:
            part.settle(round, total, refused)

    def bytes_up(self, size: int, element_size: int) -> int:
        """Bytes of an update on the wire that would take `size` bytes whole."""
        for part in self.parts:
            size = part.bytes_up(size, element_size)
        return size

    def notes(self) -> dict[str, Any]:
        """What the parts tell the round's ledger record."""
        return {name: value for part in self.parts for name, value in part.notes().items()}


def own_part_problems(own: Any) -> Iterator[str]:
    """What is wrong with a user's `update_transforms`, a sentence each."""
    if not isinstance(own, (list, tuple)):
        yield (f"Expected update_transforms to be a list of UpdatePart, found a {type(own).__name__}: pass "
               "[YourPart()].")  # fmt: skip
        return
    for place, part in enumerate(own):
        if not isinstance(part, UpdatePart):
            is_class = isinstance(part, type) and issubclass(part, UpdatePart)
            found = f"the class {part.__name__}" if is_class else f"a {type(part).__name__}"
            remedy = "pass an instance of it" if is_class else "derive it from fslora_hf.updates.part.UpdatePart"
            yield f"Expected update_transforms[{place}] to be an UpdatePart, found {found}: {remedy}."
