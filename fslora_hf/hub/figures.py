"""The figures of a round's card, drawn when the round is pushed.

Not in the training loop, when its snapshot is taken: drawing takes longer than the rest of a snapshot, and all it
needs lies there.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..reports.accuracy import plot_accuracy, round_number
from ..reports.ledger import plot_ledger, read_ledger
from ..storage.ledger import LEDGER_NAME
from ..storage.result_files import RESULTS
from .fetch import RESULTS_FOLDER
from .outbox import Snapshot

logger = logging.getLogger(__name__)

_NOTE = "figures.json"  # beside the files of a snapshot: what they do not say


def note_figures(
    folder: Path, title: str, evaluation: Mapping[int, float], results: Sequence[Mapping[str, Any]]
) -> dict[str, str]:
    """Note what `draw_figures` will need beyond the files of a snapshot.

    Args:
        folder: of the snapshot.
        evaluation: number of finished rounds -> held-out loss then.
        results: parsed result files of evaluated rounds.

    Returns the figures that there will be: title -> path in the repository.
    """
    note = {"title": title, "evaluation": dict(evaluation)}
    (folder / _NOTE).write_text(json.dumps(note) + "\n", encoding="utf-8")
    plots = {"Rounds": "rounds.png"}
    if alike := _comparable(results):
        plots["Accuracy by round"] = f"accuracy_by_round.{alike[0]['protocol']}.png"
    return plots


def draw_figures(snapshot: Snapshot) -> dict[str, Path]:
    """Draw them: path in the repository -> the file. None that cannot be drawn keeps its round from being pushed."""
    try:
        note = json.loads((snapshot.folder / _NOTE).read_text(encoding="utf-8"))
        snapshot.figures.mkdir(exist_ok=True)
        evaluation = {int(number): loss for number, loss in note["evaluation"].items()}
        rounds = read_ledger(snapshot.tree / LEDGER_NAME)
        plot_ledger(rounds, snapshot.figures / "rounds.png", evaluation, title=note["title"])
        files = sorted((snapshot.tree / RESULTS_FOLDER).glob(f"*{RESULTS}"))
        if alike := _comparable([json.loads(path.read_text(encoding="utf-8")) for path in files]):
            plot_accuracy(alike, snapshot.figures)
    except FileNotFoundError:
        pass  # a snapshot without figures
    except Exception as error:  # whatever it is, the weights are what counts
        logger.warning("Expected to draw the figures of %s, found %r: it is pushed without.", snapshot.tag, error)
    return {path.name: path for path in sorted(snapshot.figures.glob("*.png"))}


def _comparable(results: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The results that answer the same questions in the same way as the first; none if all are of one round."""
    keys = ("protocol", "rows_hash")
    alike = [result for result in results if all(result[key] == results[0][key] for key in keys)]
    return alike if len({round_number(result) for result in alike}) > 1 else []
