"""What a model card tells of a run."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..data.originals import ORIGINALS

CITATION = """\
@article{fang2025federated,
  title   = {Federated Sketching LoRA},
  author  = {Fang, Wenzhi and Han, Dong-Jun and Yuan, Liangqi
             and Hosseinalipour, Seyyedali and Brinton, Christopher G.},
  journal = {arXiv preprint arXiv:2501.19389},
  year    = {2025}
}"""


@dataclass(frozen=True)
class Benchmark:
    """The Hub's data set that a task's questions come from."""

    repository: str
    config: str | None = None
    split: str | None = None


COMMONSENSE = {task: Benchmark(each.repository, each.config, each.test) for task, each in ORIGINALS.items()}


@dataclass(frozen=True)
class CardContext:
    """What a card tells of a run.

    Args:
        name: of the run, shown to people.
        base_model: a name on the Hub, or a local folder, of which only the last part is shown.
        data: what the clients trained on, in words.
        datasets: names of those data sets of the Hub, for the card's metadata.
        target_modules: their names, or PEFT's one text for them.
        client_ranks: in words, such as "2 to 16".
        rounds_done: rounds that are in the weights beside this card.
        totals: of `report.totals`, over these rounds.
        results: parsed results files, of any rounds and protocols, the base's too.
        benchmarks: task -> where its questions come from, for the metadata; `COMMONSENSE` for those eight tasks.
        plots: title -> path in the repository.
        pushed_rounds: the earlier rounds that have a tag.
        command: that made the run; tokens in it are masked.
        best: in words, which of the evaluated rounds is the best so far and by what; None if none was chosen.
        license: the card's, unless someone wrote another into the card.
        endpoint: the Hub's address, for links.
        simulated: whether clients were not machines of their own.
    """

    name: str
    repo_id: str
    base_model: str
    data: str
    method: str
    rank: int
    alpha: float
    target_modules: str | Sequence[str]
    client_ranks: str
    num_clients: int
    clients_per_round: int
    local_steps: int
    rounds_done: int
    num_rounds: int
    totals: Mapping[str, Any]
    base_revision: str | None = None
    quantization: str | None = None
    datasets: Sequence[str] = ()
    results: Sequence[Mapping[str, Any]] = ()
    benchmarks: Mapping[str, Benchmark] = field(default_factory=dict)
    plots: Mapping[str, str] = field(default_factory=dict)
    pushed_rounds: Collection[int] = ()
    command: str | None = None
    best: str | None = None
    license: str | None = None
    citation: str = CITATION
    endpoint: str = "https://huggingface.co"
    simulated: bool = True

    @property
    def tag(self) -> str:
        """The revision that this card's round is tagged with."""
        return round_tag(self.rounds_done)


def round_tag(number: int) -> str:
    return f"round-{number:04d}"


def hub_id(name: str) -> str | None:
    """The name if it can be one of the Hub's and not of a folder here, which the Hub's checker would refuse."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return None if Path(name).exists() else name
