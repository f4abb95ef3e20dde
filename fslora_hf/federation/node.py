"""A node: one client, whose rows and model stay with it. Answers what the server asks."""

import gc
import logging
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from ..common.foreign_text import LONGEST_MESSAGE, LONGEST_NAME, LONGEST_REASON, foreign_text
from ..common.masking import scrub
from ..config.federation import FederatedSketchConfig
from ..config.recipe import RecipeArguments, build_settings
from ..data.sources import check_path, load_rows
from ..launch import build_trainer, training_rows
from ..methods import ClientAdapter
from ..models.adapter import global_pair
from ..models.folding import FoldedBase
from ..rounds.server import ServerState
from ..storage.checkpoint import FEEDBACK_NAME
from ..storage.disk_errors import WriteError
from ..trainers.checks import raise_together
from .allowed import RECIPE_TYPES, model_refusals, obeyed
from .folds import bring_up
from .node_feedback import feedback_of
from .node_trainer import NodeTrainer
from .packet import Packet, PacketError, failed
from .sparse import pack
from .standing import Standing
from .tensors import to_numpy, to_tensor

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class NodeSettings:
    """What a node decides for itself.

    Attributes:
        client_id: which client it is, a number from 0 on that no other node has.
        data: its rows: a file, a folder or a data set, as a recipe's `dataset`. None: its client's part of the
            recipe's own rows, for trying a federation out.
        model: a folder or name in place of the recipe's `model_name_or_path`; the same model.
        rank: what it can train; None leaves it to the recipe.
        dtype: precision of its base model, in place of the recipe's.
        device: `cpu` or `cuda`; None: the recipe's.
        folder: for what is of use while the node runs.
        trusts_code: whether recipes may bring code and all that `allowed.refusals` tells of: models with code of
            their own, methods in files of theirs, settings that are not known to be harmless.
        memory: a folder for what is to outlast it: what was left out of updates, with `error_feedback`. None: in
            `folder`.
    """

    client_id: int
    folder: str
    data: str | None = None
    model: str | None = None
    rank: int | None = None
    dtype: str | None = None
    device: str | None = None
    memory: str | None = None
    trusts_code: bool = False


class Node:
    """Answers packets. The model is loaded at the first invitation and stays; another recipe loads it anew.

    Raises:
        FileNotFoundError: there are no rows at the path that `settings` name.
    """

    def __init__(self, settings: NodeSettings):
        if settings.data is not None:
            check_path(settings.data)
        self.settings = settings
        self._recipe: Mapping[str, Any] | None = None
        self._trainer: NodeTrainer | None = None
        self._standing: Standing | None = None
        self._turned_away: str | None = None  # why, as the server has said last
        self._session: str | None = None  # of the server whose recipe it is
        self._frozen: dict[str, np.ndarray] = {}
        self._base_rounds: int | None = 0  # rounds that were folded into the base; None: one was interrupted

    def answer_bytes(self, blob: bytes) -> bytes:
        """The answer to a packet as it comes over the wire."""
        try:
            return self.answer(Packet.from_bytes(blob)).to_bytes()
        except PacketError as error:
            return failed(str(error)).to_bytes()

    def answer(self, packet: Packet) -> Packet:
        """The answer to a packet; what goes wrong is an answer, too."""
        try:
            if packet.kind == "join":
                return self._join(packet)
            if packet.kind == "train":
                return self._train(packet)
            if packet.kind == "turned_away":
                reason = foreign_text(packet.header.get("reason"), LONGEST_REASON)
                if reason != self._turned_away:  # the server asks again every minute
                    logger.warning("The server turned this node away: %s", reason)
                self._turned_away = reason
            return Packet({"kind": "noted"})
        except Exception as error:  # the server is told, and the node goes on
            known = isinstance(error, (ValueError, OSError))  # whose text says what there is to know
            reason = foreign_text(scrub(str(error)), LONGEST_MESSAGE)  # which the server is told
            reason = reason if known else f"{type(error).__name__}: {reason}"
            way = "" if known else "\n" + "".join(traceback.format_tb(error.__traceback__)).rstrip()
            logger.error("A packet of kind %s could not be answered: %s%s", foreign_text(packet.kind, LONGEST_NAME),
                         reason, way)  # fmt: skip
            # Who joins is not yet known by its client.
            return failed(f"client {self.settings.client_id}: {reason}" if packet.kind == "join" else reason)

    def _join(self, packet: Packet) -> Packet:
        recipe = dict(packet.header["recipe"])
        if recipe != self._recipe or self._base_rounds != 0:  # a server begins with the base as it was published
            logger.info("Loading the model and the rows of a new recipe.")
            self._trainer = self._recipe = None
            gc.collect()  # a trainer is a cycle, and its memory is needed for the next
            self._trainer, self._standing = self._build(recipe)
            self._recipe, self._base_rounds = recipe, 0
        self._session = packet.header.get("session")
        rows = len(self._trainer.train_dataset)
        logger.info("Client %d is ready with %d examples.", self.settings.client_id, rows)
        return Packet({"kind": "joined", "client_id": self.settings.client_id, "rank": self.settings.rank,
                       "examples": rows, "standing": self._standing.to_header()})  # fmt: skip

    def _build(self, values: dict[str, Any]) -> tuple[NodeTrainer, Standing]:
        own = self.settings
        values = obeyed(values, own.trusts_code)
        rows = self._rows(*build_settings(RECIPE_TYPES, values)[:2])
        local = {name: value for name, value in values.items() if name != "min_examples"}
        local |= {"output_dir": own.folder, "disable_tqdm": True, "report_to": "none"}
        for name, value in (("model_name_or_path", own.model), ("dtype", own.dtype)):
            if value is not None:
                local[name] = value
        if own.device is not None:
            local["use_cpu"] = own.device == "cpu"
        recipe, args, model_args = build_settings(RECIPE_TYPES, local)
        if own.rank is not None and own.rank > model_args.lora_r:
            raise_together([f"Expected --rank of at most lora_r={model_args.lora_r}, found {own.rank}: start the node "
                            "with a lower one, or raise lora_r in the recipe."])  # fmt: skip
        # The widest that there can be: the rank of each round comes with it.
        args.client_ranks = [own.rank or model_args.lora_r]
        standing = Standing.of(args, model_args)  # first: it refuses a model without weights as safetensors
        if not own.trusts_code:
            raise_together(model_refusals(model_args.model_name_or_path, model_args.model_revision))
        trainer = build_trainer(recipe, args, model_args, rows=rows, evaluates=False, trainer_class=NodeTrainer)
        return trainer, standing

    def _rows(self, recipe: RecipeArguments, args: FederatedSketchConfig) -> Dataset:
        column, client = args.client_id_column, self.settings.client_id
        if self.settings.data is not None:
            rows = self._own_rows(self.settings.data, recipe.train_rows_per_task, args.seed)
            rows = rows.remove_columns([column]) if column in rows.column_names else rows
            return rows.add_column(column, np.full(len(rows), client))
        rows = training_rows(recipe, args)
        own = np.flatnonzero(np.asarray(rows[column]) == client)
        if not len(own):
            raise_together([f"Expected client {client} among the recipe's, found none of its rows: choose another "
                            "client_id, or give the node data of its own."])  # fmt: skip
        return rows.select(own)

    def _own_rows(self, source: str, per_task: int | None, seed: int) -> Dataset:
        try:
            return load_rows(source, "train", rows_per_task=per_task, seed=seed)
        except WriteError:
            raise
        except (ValueError, OSError) as error:  # whose text may quote a row, which is for this node's owner alone
            logger.error("The rows of this node cannot be used: %s", foreign_text(error, LONGEST_MESSAGE))
            raise ValueError("Expected --data to hold rows that can be used, found others: the node's log says what "
                             "is wrong with them; correct it, and start the node anew.") from error  # fmt: skip

    def _train(self, packet: Packet) -> Packet:
        header = packet.header
        self._turned_away = None
        behind = self._base_rounds is None or self._base_rounds < header.get("base_from", 0)
        if self._trainer is None or behind or header.get("session") != self._session:
            reason = "the node was started anew or has joined another run, and has yet to join this one"
            return Packet({"kind": "failed", "reason": reason, "uninvited": True})
        if header.get("notice"):
            notice = foreign_text(header["notice"], LONGEST_REASON)
            logger.warning("The last update was left out because %s.", notice)
        rank, args = int(header["rank"]), self._trainer.args
        if args.error_feedback:
            folder = self.settings.memory or Path(self.settings.folder) / FEEDBACK_NAME
            self._trainer.feedback = feedback_of(folder, str(header["run"]))
            self._trainer.feedback.settle(self.settings.client_id, header["folded"], header["checkpoints"])
        self._fold(packet)
        received = self._received(packet, rank)
        logger.info("Round %d: training at rank %d.", int(header["round"]), rank)
        returned = self._trainer.train_round(int(header["round"]), received)
        answer = {"kind": "update", "round": header["round"], "client_id": self.settings.client_id}
        answer["loss"], tensors = returned.loss, to_numpy({"A": returned.update.A, "B": returned.update.B})
        if args.upload_top_k is not None:
            tensors = pack(tensors, args.upload_top_k)
        return Packet(answer, tensors)

    def _fold(self, packet: Packet) -> None:
        """Bring the base model up to the server's, where the method changes it."""
        if not self._trainer.method.folds:
            return
        now, have = int(packet.header["base_rounds"]), self._base_rounds
        self._base_rounds = None  # until it is whole again
        bring_up(FoldedBase.of(self._trainer.model), packet.tensors, str(packet.header["base_dtype"]), have, now)
        self._base_rounds = now

    def _received(self, packet: Packet, rank: int) -> ClientAdapter:
        """The adapter to begin with: what came, or what the method makes of the global adapter that came."""
        trainer, method = self._trainer, self._trainer.method
        trainer.set_rank(rank)
        pair = global_pair(trainer.model)
        if method.folds:  # beside a global adapter that is as it was made, and adds nothing
            return self._begin_beside(packet)
        tensors = self._frozen | dict(packet.tensors)
        frozen = [f"{side}." for side in "AB" if side not in method.trains]
        self._frozen = {name: tensor for name, tensor in tensors.items() if name.startswith(tuple(frozen))}
        halves = [
            {module: to_tensor(tensors[f"{side}.{module}"], like) for module, like in own.items()}
            for side, own in zip("AB", pair, strict=True)
        ]
        if not method.beside_global:
            return ClientAdapter(*halves, float(packet.header["scale"]))
        for own, came in zip(pair, halves, strict=True):
            for module, tensor in came.items():
                own[module].data.copy_(tensor)
        return self._begin_beside(packet)

    def _begin_beside(self, packet: Packet) -> ClientAdapter:
        """What the method has this client begin with, drawn here, beside the global adapter."""
        (client,) = self._trainer.round_plan(int(packet.header["round"])).clients
        return self._trainer.method.receive(ServerState(*global_pair(self._trainer.model)), client, client.sketch)
