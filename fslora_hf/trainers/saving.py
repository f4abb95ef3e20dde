"""What a snapshot of a run holds, for a checkpoint or for the Hub: the files, how they are written and taken back."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase, TrainerState

from ..methods import method_class
from ..models.adapter import global_pair, read_global_pair
from ..models.folding import FOLDED_NAME, FoldedBase
from ..rounds.server import ServerState
from ..storage.checkpoint import SERVER_NAME

ADAPTER_NAME, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
ARGUMENTS_NAME = "training_args.json"
TRAINER_STATE = "trainer_state.json"


def files_to_resume_from(folds: bool) -> list[str]:
    """What a run is resumed from; `folds`: its method changes the base."""
    names = [ADAPTER_NAME, ADAPTER_CONFIG, SERVER_NAME, TRAINER_STATE, ARGUMENTS_NAME]
    return [*names, FOLDED_NAME] if folds else names


@dataclass(frozen=True)
class Learned:
    """What a run learns: the global adapter, and the base where the method changes it (`folds`)."""

    model: PeftModel
    folds: bool

    @classmethod
    def of(cls, model: PeftModel, method: str) -> "Learned":
        return cls(model, method_class(method).folds)

    def tensors(self) -> list[torch.Tensor]:
        """What `load` writes to."""
        A, B = global_pair(self.model)
        folded = FoldedBase.of(self.model).weights if self.folds else {}
        return [*A.values(), *B.values(), *folded.values()]

    def save(self, folder: Path) -> None:
        """Write the plain adapter, which PEFT loads, and what was folded into the base."""
        self.model.save_pretrained(str(folder), selected_adapters=["default"], save_embedding_layers=False)
        if self.folds:
            FoldedBase.of(self.model).save(folder / FOLDED_NAME)

    def load(self, folder: Path) -> None:
        """Take all of it from a snapshot.

        Raises:
            CheckpointError: the snapshot is not of such a model, or damaged.
        """
        saved = read_global_pair(self.model, folder / ADAPTER_NAME)
        for tensors, values in zip(global_pair(self.model), saved, strict=True):
            for name, tensor in tensors.items():
                tensor.data.copy_(values[name])
        if self.folds:
            FoldedBase.of(self.model).load(folder / FOLDED_NAME)


@dataclass(frozen=True)
class Snapshot:
    """What is written of a run when a round is over.

    Args:
        learned: the global adapter and the base.
        tokenizer: which the adapter is used with.
        arguments: what the run was told, by name.
        server: the server's state after the round.
        state: the Trainer's, as at the round's end.
    """

    learned: Learned
    tokenizer: PreTrainedTokenizerBase
    arguments: Mapping[str, Any]
    server: ServerState | None = None
    state: TrainerState | None = None

    def save(self, folder: Path) -> None:
        """Write the files into a folder that is there: those that the adapter is used with, and with `server` and
        `state` those that a run is resumed from."""
        self.learned.save(folder)
        self.tokenizer.save_pretrained(str(folder))
        arguments = json.dumps(self.arguments, indent=2, default=_plain)  # which the Trainer would pickle
        (folder / ARGUMENTS_NAME).write_text(arguments + "\n", encoding="utf-8")
        if self.server is not None:
            self.server.save(folder / SERVER_NAME)
        if self.state is not None:
            self.state.save_to_json(str(folder / TRAINER_STATE))


def _plain(value: Any) -> Any:
    """What JSON can hold of a value it does not know: numpy's numbers as numbers, all else as text."""
    return value.item() if hasattr(value, "item") else str(value)
