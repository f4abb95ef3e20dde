"""What an evaluation can be asked to score: a base model, an adapter, a checkpoint, a whole run, a Hub repository."""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError, safe_open
from torch import nn

from ..common.foreign_text import LONGEST_REASON, foreign_text
from ..common.settings import SettingsError, field_problems, sentence
from ..models.adapter import PEFT_PREFIX
from ..storage.checkpoint import STATE_NAME, finished_checkpoints, read_state
from ..storage.ledger import LEDGER_NAME
from ..storage.result_files import slug

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass
class EvaluationArguments:
    """What an evaluation scores beside the settings of a recipe, and where its results go.

    Raises:
        SettingsError: a ValueError with one line for each setting that cannot work.
    """

    adapter: str | None = field(
        default=None,
        metadata={
            "help": "What to score on the base model: an adapter's folder or a checkpoint, a run's folder (all its "
            "checkpoints and the base), or a Hub repository, as owner/name or owner/name@revision. None: the base."
        },
    )
    results_dir: str | None = field(
        default=None,
        metadata={"help": "Folder of the result files. None: <run>/evaluation for a run, else outputs/evaluation."},
    )
    with_base: bool = field(default=False, metadata={"help": "Score the base model beside a single adapter, too."})
    allow_other_base: bool = field(
        default=False, metadata={"help": "Score an adapter although it was trained on a base of another name."}
    )

    def __post_init__(self):
        problems = field_problems(self)
        if self.adapter == "":
            problems["adapter"] = sentence("adapter", "a folder or a repository", "", "remove it to score the base")
        if problems:
            raise SettingsError(list(problems.values()))


@dataclass(frozen=True)
class FoundAdapter:
    """An adapter on disk: how its result files are called, where it came from, its folder, and the name of its run."""

    label: str
    source: str
    folder: Path
    revision: str | None = None
    round: int | None = None
    run: str | None = None

    @property
    def name(self) -> str:
        """As people read it."""
        near = "/".join(self.folder.resolve().parts[-2:])
        where = self.run or (near if self.revision is None else f"{self.source}@{self.revision[:8]}")
        return where if self.round is None else f"{where}, round {self.round}"


def find_adapters(adapter: str | None) -> tuple[list[FoundAdapter], Path | None]:
    """The adapters that `adapter` names, in the order of their rounds, and the folder of their run if it names one.

    Raises:
        ValueError: it names nothing that can be scored.
    """
    if adapter is None:
        return [], None
    path = Path(adapter).expanduser()
    if path.is_dir():
        run = (path / LEDGER_NAME).is_file() or any(path.glob("checkpoint-*"))
        return (_of_run(path), path) if run else ([_of_folder(path, slug(path.resolve().parts[-2:]))], None)
    repository, _, revision = adapter.partition("@")
    if path.exists() or not _REPOSITORY.fullmatch(repository):
        raise ValueError(
            f"Expected adapter to be a folder or a Hub repository (owner/name or owner/name@revision), found "
            f"{adapter!r}: correct it."
        )
    return [_of_repository(repository, revision or None)], None


def _of_run(path: Path) -> list[FoundAdapter]:
    found = dict(finished_checkpoints(path))
    if found:
        return [
            FoundAdapter(f"round-{round:04d}", str(folder), folder, round=round, run=path.resolve().name)
            for round, folder in sorted(found.items())
        ]
    if (path / ADAPTER_CONFIG).is_file():
        return [_of_folder(path, "final")]
    raise ValueError(
        f"Expected a finished checkpoint or an adapter in the run {path}, found neither: train it with save_rounds "
        "above 0, or name another folder."
    )


def _of_folder(path: Path, label: str) -> FoundAdapter:
    missing = [name for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS) if not (path / name).is_file()]
    if missing:
        raise ValueError(
            f"Expected an adapter or a run in {path}, found no {' and no '.join(missing)}: name the folder of an "
            "adapter, a checkpoint or a run; a whole model goes into model_name_or_path."
        )
    state = path / STATE_NAME
    return FoundAdapter(
        label, str(path), path, round=read_state(path, verify=False)["round"] if state.is_file() else None
    )


def _of_repository(repository: str, revision: str | None) -> FoundAdapter:
    """Only the adapter and the run's state are fetched: safetensors and JSON."""
    named = f"{repository}@{revision}" if revision else repository
    try:
        folder = Path(
            snapshot_download(
                repository, revision=revision, allow_patterns=[ADAPTER_CONFIG, ADAPTER_WEIGHTS, STATE_NAME]
            )
        )
    except (RepositoryNotFoundError, RevisionNotFoundError, LocalEntryNotFoundError, HfHubHTTPError) as error:
        what = foreign_text(error, LONGEST_REASON)
        raise ValueError(
            f"Expected the adapter {named} on the Hub, found none that can be fetched ({what}): correct the name or "
            "the revision, log in with `hf auth login`, or name a local folder."
        ) from error
    found = _of_folder(folder, slug([repository, *([revision] if revision else [])]))
    return FoundAdapter(found.label, repository, folder, revision=folder.name, round=found.round)


def check_base_name(found: FoundAdapter, model_name: str, allow_other_base: bool) -> None:
    """Raises ValueError if the adapter was trained on a base of another name: a base of the same shape would load.

    The last parts of both names are compared, so that a local copy of a Hub model counts as that model.
    """
    path = found.folder / ADAPTER_CONFIG
    try:
        trained_on = json.loads(path.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (ValueError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"Expected an adapter's settings in {path}, found damage ({foreign_text(error)}): fetch it again."
        ) from error
    last = [re.split(r"[/\\]", str(name).rstrip("/\\"))[-1].lower() for name in (trained_on, model_name)]
    if trained_on and last[0] != last[1] and not allow_other_base:
        raise ValueError(
            f"Expected the base of the adapter {found.source}, {foreign_text(trained_on)}, found "
            f"model_name_or_path={model_name}: name that base, or set allow_other_base to true if both are the "
            "same model."
        )


def check_base_shapes(found: FoundAdapter, base: nn.Module) -> None:
    """Raises ValueError if a tensor of the adapter has no layer of its shape in the base."""
    modules = dict(base.named_modules())
    path = found.folder / ADAPTER_WEIGHTS
    try:
        with safe_open(path, framework="pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        told = foreign_text(error)
        raise ValueError(f"Expected an adapter in {path}, found damage ({told}): fetch or train it again.") from error
    for name, shape in shapes.items():
        module, _, side = name.removeprefix(PEFT_PREFIX).partition(".lora_")
        if side[:1] not in ("A", "B"):  # another kind of tensor; PEFT tells if it does not fit
            continue
        if len(shape) != 2:
            raise ValueError(f"Expected matrices in the adapter {found.source}, found {foreign_text(name)} of shape "
                             f"{shape}: fetch or train it again.")  # fmt: skip
        layer, into = modules.get(module), side.startswith("A")
        wants = shape[1] if into else shape[0]
        # transformers' Conv1D, as in GPT-2, calls its inputs and outputs nx and nf.
        names = ("in_features", "nx") if into else ("out_features", "nf")
        has = next((getattr(layer, name) for name in names if hasattr(layer, name)), None)
        if layer is None or (has is not None and has != wants):
            what = "no such layer" if layer is None else f"a layer with {has}"
            raise ValueError(
                f"Expected a base with {wants} {'inputs' if into else 'outputs'} in {foreign_text(module)}, as the "
                f"adapter {found.source} has it, found {what}: name the base that the adapter was trained on."
            )
