"""What clients have left out of their updates: one file for each client that took part, on disk and in checkpoints.

A file is written once, named after the round and the content, and never changed: a checkpoint holds links to the files
that were current when it was taken, which costs no copies. A client's older file goes when the round is over.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Collection, Container, Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load, save

from ..common.foreign_text import foreign_text, foreign_value
from ..storage.checkpoint import FEEDBACK_NAME, CheckpointError
from ..storage.disk_errors import RESUME, told
from ..storage.files import make_folder, whole_file
from ..storage.json_file import DamagedFile, read_object
from ..storage.tensor_file import Wanted, read_tensors, tensor_shapes

INDEX_NAME = "error_feedback.json"
Pair = tuple[Mapping[str, torch.Tensor], Mapping[str, torch.Tensor]]
_CLIENT, _FILE = re.compile(r"0|-?[1-9]\d{0,18}"), re.compile(r"\d{8,18}-[0-9a-f]{16}\.safetensors")
_REMEDY = "the checkpoint was damaged or is of another run; restore it or resume from another"


class Waiting:
    """What one client has left out: rows of the global A and columns of the global B, those it ever had a part of."""

    def __init__(self, tensors: dict[str, torch.Tensor]):
        self.tensors = tensors  # "<module>.rows" int64 [m], "<module>.A" [m, in], "<module>.B" [out, m]

    def add(self, module: str, rows: np.ndarray, A: torch.Tensor | None, B: torch.Tensor | None) -> None:
        """Add a change of A `[k, in]` and B `[out, k]` at the given rows and columns; None for a side not trained."""
        places = self._places(module, rows, A, B)
        if A is not None:
            self.tensors[f"{module}.A"][places] += A.cpu()
        if B is not None:
            self.tensors[f"{module}.B"][:, places] += B.cpu()

    def subtract(self, module: str, rows: np.ndarray, A: torch.Tensor | None, B: torch.Tensor | None) -> None:
        """Take what was sent away."""
        self.add(module, rows, None if A is None else -A, None if B is None else -B)

    def part(self, side: str, module: str, rows: np.ndarray) -> torch.Tensor:
        """What waits at these rows of A, `[k, in]`, or columns of B, `[out, k]`."""
        places, tensor = self._find(module, rows), self.tensors[f"{module}.{side}"]
        return tensor[places] if side == "A" else tensor[:, places]

    def _find(self, module: str, rows: np.ndarray) -> torch.Tensor:
        return torch.searchsorted(self.tensors[f"{module}.rows"], torch.as_tensor(rows))

    def _places(self, module: str, rows: np.ndarray, A: torch.Tensor | None, B: torch.Tensor | None) -> torch.Tensor:
        """Where the rows stand, after making room for those that are new."""
        known = self.tensors.get(f"{module}.rows", torch.zeros(0, dtype=torch.int64))
        union = torch.as_tensor(np.union1d(known.numpy(), rows))
        if len(union) > len(known):
            old = torch.searchsorted(union, known)
            for side, like, axis in (("A", A, 0), ("B", B, 1)):
                if like is None:
                    continue
                shape = list(like.shape)
                shape[axis] = len(union)
                room = torch.zeros(shape, dtype=like.dtype)
                if f"{module}.{side}" in self.tensors:
                    room.index_copy_(axis, old, self.tensors[f"{module}.{side}"])
                self.tensors[f"{module}.{side}"] = room
            self.tensors[f"{module}.rows"] = union
        return self._find(module, rows)


class ErrorFeedback:
    """The files of a run, `<folder>/<client id>/<round>-<hash>.safetensors`.

    A process writes the files of the clients that it trains; all processes see the same folder.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self._written: list[int] = []

    def take(self, client_id: int, round: int) -> Waiting:
        """What a client had left out before its part in `round`; nothing at first.

        Raises:
            CheckpointError: its file is not what was written.
        """
        path = _newest(self.folder / str(client_id), round)
        return Waiting({} if path is None else load(_read(path)))

    def keep(self, client_id: int, round: int, waiting: Waiting) -> None:
        """Write what a client has left out after its part in `round`."""
        content = save({name: tensor.contiguous() for name, tensor in waiting.tensors.items()})
        folder = make_folder(self.folder / str(client_id), RESUME)
        # Not synced: whoever reads it looks at its checksum, and a checkpoint that takes it syncs it.
        with whole_file(folder / f"{round:08d}-{_digest(content)}.safetensors", RESUME, sync=False) as file:
            file.write(content)
        self._written.append(client_id)

    def close_round(self, round: int, refused: Collection[int] = ()) -> None:
        """Leave one file of each client that this process trained in a round that is over: that of the round, or where
        its update was refused, which makes what was left out of it void, the one before."""
        for client_id in self._written:
            for path in _files(self.folder / str(client_id)):
                if _round(path) == round if client_id in refused else _round(path) < round:
                    path.unlink()
        self._written = []

    def link_into(self, checkpoint: Path, rounds_done: int) -> None:
        """Put the files that are current after `rounds_done` rounds into a checkpoint, with an index of their names.

        Takes a link for each client that ever took part; on a disk without links, a copy.
        """
        index = {}
        for folder in sorted(self.folder.iterdir()) if self.folder.is_dir() else ():
            path = _newest(folder, rounds_done)
            if path is not None:
                index[folder.name] = path.name
                (checkpoint / FEEDBACK_NAME / folder.name).mkdir(parents=True)
                _link(path, checkpoint / FEEDBACK_NAME / folder.name / path.name)
        (checkpoint / INDEX_NAME).write_text(json.dumps(index) + "\n", encoding="utf-8")

    def restore(self, checkpoint: Path | None = None) -> None:
        """Begin with what a checkpoint holds, or with nothing."""
        self._written = []
        with told(self.folder, RESUME):
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True)
            for path in () if checkpoint is None else _indexed(checkpoint):
                (self.folder / path.parent.name).mkdir()
                _link(path, self.folder / path.parent.name / path.name)


def check_waiting(checkpoint: Path, rounds: int, clients: Container[int], pair: Pair) -> None:
    """See that a checkpoint holds what its clients have left out, before anything is changed for its sake.

    Args:
        rounds: that the checkpoint is of.
        clients: the ids there are.
        pair: the global adapter, module name -> A `[r, in]`, and -> B `[out, r]`.

    Raises:
        CheckpointError: a client's file is missing, or not what was written, or cannot be of this run.
    """
    for path in _indexed(checkpoint):
        if int(path.parent.name) not in clients or _round(path) >= rounds:
            raise CheckpointError(
                f"Expected files of this run's clients in its first {rounds:,} rounds in {checkpoint / INDEX_NAME}, "
                f"found {foreign_text(path.relative_to(checkpoint))}: {_REMEDY}."
            )
        if not path.is_file():
            raise CheckpointError(
                f"Expected {path}, what client {path.parent.name} has left out of its updates, found no file: copy a "
                "checkpoint with all that is in it, or resume from another."
            )
        _read(path)
        _check_tensors(path, pair)


def _check_tensors(path: Path, pair: Pair) -> None:
    """See that a client's file holds rows of the global A and columns of the global B, as `Waiting` keeps them."""
    shapes, wanted = tensor_shapes(path), {}
    for module in {name.rpartition(".")[0] for name in shapes} & pair[0].keys():
        A, B, count = pair[0][module], pair[1][module], shapes.get(f"{module}.rows", ())[:1] or (0,)
        wanted[f"{module}.rows"] = Wanted(count, (torch.int64,))
        sides = {"A": Wanted((*count, A.shape[1]), (A.dtype,)), "B": Wanted((B.shape[0], *count), (B.dtype,))}
        # A method that trains one side keeps nothing of the other.
        wanted |= {f"{module}.{side}": want for side, want in sides.items() if f"{module}.{side}" in shapes}
    rank = next(iter(pair[0].values())).shape[0]
    for name, tensor in read_tensors(path, wanted).items():
        rows = tensor.tolist() if name.endswith(".rows") else []
        if rows and not (rows == sorted(set(rows)) and 0 <= rows[0] and rows[-1] < rank):
            raise CheckpointError(
                f"Expected ascending rows of the global adapter's {rank} in {name} in {path}, found others: {_REMEDY}."
            )


def _indexed(checkpoint: Path) -> list[Path]:
    """The files that a checkpoint's index names.

    Raises:
        CheckpointError: there is no such index, or it names a file of another kind.
    """
    path = checkpoint / INDEX_NAME
    try:
        index = read_object(path)
        wrong = [
            foreign_value(name)
            for client, name in index.items()
            if not (_CLIENT.fullmatch(client) and isinstance(name, str) and _FILE.fullmatch(name))
        ]
        if wrong:
            raise DamagedFile(f"the name {wrong[0]}")
    except DamagedFile as error:
        raise CheckpointError(
            f"Expected the files of what clients have left out of their updates in {path}, found damage ({error}): "
            f"{_REMEDY}."
        ) from error
    return [checkpoint / FEEDBACK_NAME / client_id / name for client_id, name in index.items()]


def file_rounds(folder: Path) -> dict[int, Path]:
    """Round -> the file of what a client had left out after it, of a client's folder."""
    return {_round(path): path for path in _files(folder)}


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*-*.safetensors"))


def _round(path: Path) -> int:
    return int(path.name.split("-")[0])


def _newest(folder: Path, before: int) -> Path | None:
    """The file of the last round before the given one."""
    return next((path for path in reversed(_files(folder)) if _round(path) < before), None)


def _read(path: Path) -> bytes:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"Expected to read {path}, found '{error.strerror}': {_REMEDY}.") from error
    wanted, found = path.stem.split("-")[1], _digest(content)
    if found != wanted:
        raise CheckpointError(
            f"Expected {path} with the checksum {wanted}, found {found}: the file was damaged or changed; restore it "
            "or resume from an earlier checkpoint."
        )
    return content


def _link(path: Path, target: Path) -> None:
    try:
        os.link(path, target)
    except OSError:
        shutil.copyfile(path, target)


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
