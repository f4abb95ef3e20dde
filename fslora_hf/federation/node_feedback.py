"""What a node's client has left out of its updates (`error_feedback`), in step with a server that may go back."""

import logging
import re
from collections.abc import Collection
from pathlib import Path

from ..common.foreign_text import foreign_value
from ..updates.feedback import ErrorFeedback, file_rounds

logger = logging.getLogger(__name__)

_RUN = re.compile(r"[0-9a-f]{16}")


class NodeFeedback(ErrorFeedback):
    """An ErrorFeedback of one client, in which what it left out of an update that the server did not fold is void.

    With each part the server says which update of this client it folded last, and which checkpoints it has: it may be
    killed and go on from one of them. Files of these rounds are kept, and no others.
    """

    def settle(self, client_id: int, folded: int | None, checkpoints: Collection[int]) -> None:
        """Go back to what the client had left out after its part in the round `folded`; None: to nothing.

        Args:
            checkpoints: rounds done in each of the server's.
        """
        self._written = []
        files = file_rounds(self.folder / str(client_id))
        kept: set[int] = set()
        if folded in files:
            current = [round for round in files if round <= folded]
            kept = {max((r for r in current if r < done), default=-1) for done in checkpoints} | {folded}
        elif folded is not None:
            logger.warning(
                "Expected what was left out of the update of round %d in %s, found nothing: it is lost, and error "
                "feedback begins anew; keep it over restarts with --folder.", folded, self.folder,
            )  # fmt: skip
        for round, path in files.items():
            if round not in kept:
                path.unlink()


def feedback_of(folder: str | Path, run: str) -> NodeFeedback:
    """The feedback that a node keeps in a folder for one of the server's runs.

    Raises:
        ValueError: `run`, which comes over the wire, is not the name of one.
    """
    if not _RUN.fullmatch(run):
        raise ValueError(f"Expected a run's number of 16 hexadecimal digits, found {foreign_value(run)}.")
    return NodeFeedback(Path(folder) / run)
