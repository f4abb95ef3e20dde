"""What may happen to a client's update between its local steps and the server's: the parts of a pipeline."""

from collections.abc import Collection
from typing import Any

from ..methods import ClientUpdate, FlatTensors, SketchedClient


class RefusedUpdate(Exception):
    """An update the server will not fold; its text is the reason in the round ledger."""


class UpdatePart:
    """One thing that happens to updates, at up to three places. A subclass overrides those that it needs.

    | place | runs | is given | returns |
    |---|---|---|---|
    | `send` | at the client, before the wire: on its node, in the simulator in the process that trained it | its change A `[k, in]`, B `[out, k]` by module | what it sends, of the same shapes |
    | `take` | at the server, before an update is folded; in the simulator in the process that trained it | the change as it came, of the same shapes | what is folded, or raises `RefusedUpdate` |
    | `settle` | at the server, once a round, on the sum of all updates before the server's step; in the simulator in every process, alike | the method's accumulator, summed over processes | nothing: changes the sum in place |

    A pipeline runs all `send` in its order, then all `take`, and once a round all `settle`. Parts come in this order:
    what looks at whole changes, top-k, the finite check, the bounds on norms, and then a user's own.

    Axes: `k` is the client's rank; `in` and `out` are the features of the module. A side that the method does not
    train is an empty dict. Make a new update with `dataclasses.replace(update, A=..., B=...)`; tensors may be changed
    in place. Where updates are thinned (`upload_top_k`), what was not sent is zero from there on.

    One instance serves a whole run, after an interruption a new one: what must be remembered from round to round has
    no place in its attributes. Randomness is drawn from a path such as (seed, round, client), never from a stream:
    rounds may be done again, and the processes of a run must come to the same sum.
    """  # noqa: E501

    def send(self, round: int, client: SketchedClient, update: ClientUpdate) -> ClientUpdate:
        """What `client` sends of its change in `round`, counted from 0."""
        return update

    def take(self, round: int, client: SketchedClient, update: ClientUpdate) -> ClientUpdate:
        """What is folded of an update that came.

        Raises:
            RefusedUpdate: nothing is; its text says why.
        """
        return update

    def settle(self, round: int, total: FlatTensors, refused: Collection[int]) -> None:
        """Change what all accepted updates add up to.

        Args:
            total: the method's accumulator over all clients and processes: with a weighted mean `<module>.A` `[r, in]`
                and `<module>.B` `[out, r]`, each update times its weight, and `weight` `[1]`, by which `finish`
                divides. `total.flat` holds all numbers as one vector.
            refused: ids of the clients that trained in this process and whose updates were left out.
        """

    def bytes_up(self, size: int, element_size: int) -> int:
        """Bytes that an update takes on the wire after `send`, of the `size` bytes that it took before it.

        Args:
            element_size: bytes of a number.
        """
        return size

    def notes(self) -> dict[str, Any]:
        """What the ledger's record of the round shall hold, by names that it does not have; asked after `settle`."""
        return {}
