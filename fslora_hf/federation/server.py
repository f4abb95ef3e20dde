"""A federated run on its server: from a recipe to the trained adapter, over whatever carries packets to the nodes."""

import logging
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from ..common.settings import SettingsError, field_problems, is_a, sentence
from ..config.federation import FederatedSketchConfig
from ..config.ranges import range_problems
from ..config.recipe import ModelArguments, RecipeArguments, build_settings, read_file, read_flags
from ..data.sources import check_path
from ..launch import build_trainer, finish
from ..storage.locks import held
from ..trainers.identity import ranks_of_clients
from ..trainers.resume import refuse_occupied
from .allowed import RECIPE_TYPES, told_to_nodes
from .exchange import Exchange
from .packet import Packet
from .remote import RoundRules
from .roster import Roster
from .standing import Standing
from .trainer import FederationTrainer

logger = logging.getLogger(__name__)


@dataclass
class FederationArguments:
    """How a federation is run; what it computes is the recipe's.

    Raises:
        SettingsError: a ValueError with one line for each setting that cannot work.
    """

    recipe: str = field(default="", metadata={"decides": "result", "help": "A recipe's YAML file, on the server."})
    overrides: str = field(
        default="", metadata={"decides": "result", "help": "Settings over the recipe's: --num_rounds 5 ..."}
    )
    resume: bool = field(
        default=False, metadata={"decides": "server", "help": "Go on from the last checkpoint in output_dir."}
    )
    # No run's identity holds these four: the ledger tells of each round what they came to, and they may change.
    clients: int | None = field(
        default=None,
        metadata={
            "decides": "result",
            "entry": None,
            "help": "Clients to wait for before the first round. None: the recipe's num_clients.",
        },
    )
    min_clients: int = field(
        default=1,
        metadata={
            "decides": "result",
            "entry": None,
            "help": "Clients to begin with, and updates of a round, at least.",
        },
    )
    join_deadline_s: float = field(
        default=600.0, metadata={"decides": "server", "help": "Seconds that nodes have to join."}
    )
    round_deadline_s: float = field(
        default=3600.0, metadata={"decides": "server", "help": "Seconds that a round's clients have."}
    )
    max_update_norm: float = field(
        default=1e6,
        metadata={
            "decides": "result",
            "entry": None,
            "help": "Refuse updates of a larger Frobenius norm, whose products could overflow.",
        },
    )
    max_norm_ratio: float = field(
        default=10.0,
        metadata={
            "decides": "result",
            "entry": None,
            "help": "Refuse updates whose norm is more than so many times the median norm of this round's and the "
            "last rounds' updates. 0: no such bound.",
        },
    )

    def __post_init__(self):
        problems = range_problems(self) | field_problems(self)
        if not self.recipe:
            problems["recipe"] = sentence("recipe", "a YAML file", self.recipe, "name one")
        if is_a(self.max_update_norm, float) and not self.max_update_norm > 0:
            problems["max_update_norm"] = sentence("max_update_norm", "above 0", self.max_update_norm, "raise it")
        ratio = self.max_norm_ratio
        if is_a(ratio, float) and ratio != 0 and not 1 < ratio:
            expected = "above 1, or 0 for no bound"
            problems.setdefault("max_norm_ratio", sentence("max_norm_ratio", expected, ratio, "raise it"))
        if problems:
            raise SettingsError(list(problems.values()))


def read_recipe(federation: FederationArguments) -> dict[str, Any]:
    """The recipe's settings with the overrides in their place, as plain values."""
    values = read_file(RECIPE_TYPES, federation.recipe)
    try:
        words = shlex.split(federation.overrides)
    except ValueError:  # whose text may be a token's
        remedy = "close every quotation"
        raise SettingsError(
            [f"Expected overrides to be words of a command line, found no end of one: {remedy}."]
        ) from None
    return values | read_flags(RECIPE_TYPES, words)


def check_recipe(args: FederatedSketchConfig, min_clients: int) -> Iterator[str]:
    """What a federation cannot do that the simulator can, a sentence each."""
    if args.resume_from_checkpoint is not None:
        yield ("Expected resume_from_checkpoint to be unset in a federation, found "
               f"{args.resume_from_checkpoint!r}: set resume=true in --run-config.")  # fmt: skip
    if args.clients_per_round is not None and min_clients > args.clients_per_round:
        yield (f"Expected min-clients of at most clients_per_round={args.clients_per_round}, found {min_clients}: "
               "lower it, or raise clients_per_round.")  # fmt: skip


def run_federation(federation: FederationArguments, exchange: Exchange) -> str:
    """Run a federation to its end; returns its ledger as a table.

    Raises:
        SettingsError: settings that cannot work, before anything is loaded.
        FolderInUse: another launch is at work in the recipe's output_dir; no node was asked for anything.
        FederationError: too few nodes joined or answered; the rounds before are kept.
        RunLost: the run learns nothing, or nothing good any more; all that was written is kept.
    """
    values = read_recipe(federation)
    settings = _, args, _ = build_settings(RECIPE_TYPES, values)
    problems = list(check_recipe(args, federation.min_clients))
    if problems:
        raise SettingsError(problems)
    with held(args.output_dir):  # before nodes are asked, which may be at work for the run that is there
        return _run(federation, exchange, values, settings)


def _run(
    federation: FederationArguments, exchange: Exchange, values: dict[str, Any], settings: tuple[Any, Any, Any]
) -> str:
    recipe, args, _ = settings
    if not federation.resume:
        refuse_occupied(Path(args.output_dir), resuming="resume=true in --run-config")
    evaluates = bool(args.eval_rounds or args.eval_on_start)
    if evaluates:
        check_path(recipe.dataset)
    roster = _gather(federation, exchange, values, *settings)
    _fit_to(roster, *settings)
    rules = RoundRules(federation.round_deadline_s, federation.min_clients, federation.max_update_norm,
                       federation.max_norm_ratio)  # fmt: skip
    trainer = build_trainer(
        *settings,
        trainer_class=partial(FederationTrainer, exchange, roster, rules),
        rows=placeholder_rows(roster, args.client_id_column),
        evaluates=evaluates,
    )
    # The process's own command line is Flower's, and holds a token.
    command = f"flwr run recipes/federation/app --run-config 'recipe=\"{Path(federation.recipe).name}\"'"
    trainer.card_facts = {**trainer.card_facts, "command": command, "simulated": False,
                          "data": f"{len(trainer.train_dataset):,} rows of {len(roster.members)} clients"}  # fmt: skip
    trainer.train(resume_from_checkpoint=True if federation.resume else None)
    return finish(trainer)


def _gather(
    federation: FederationArguments,
    exchange: Exchange,
    values: dict[str, Any],
    recipe: RecipeArguments,
    args: FederatedSketchConfig,
    model_args: ModelArguments,
) -> Roster:
    """The clients of the run, once enough of their nodes have joined; `values` are what the settings were made of."""
    own = Standing.of(args, model_args)
    invitation = Packet({"kind": "join", "recipe": told_to_nodes(values)})
    roster = Roster(exchange, invitation, own, federation.join_deadline_s, model_args.lora_r)
    if federation.resume and roster.restore(Path(args.output_dir)):
        roster.wait(len(roster.members), federation.min_clients, federation.join_deadline_s)
    else:
        roster.wait(federation.clients or recipe.num_clients, federation.min_clients, federation.join_deadline_s)
        roster.close()
    return roster


def _fit_to(roster: Roster, recipe: RecipeArguments, args: FederatedSketchConfig, model_args: ModelArguments) -> None:
    """Make the run's settings those of the clients that there are."""
    count = recipe.num_clients or 0
    known = ranks_of_clients(args, count, model_args.lora_r) if count else np.zeros(0, dtype=np.int64)
    ranks = roster.ranks(lambda client: int(known[client]) if client < len(known) else None)
    args.client_ranks, args.min_rank, args.max_rank = ranks, None, None
    args.rank_distribution = FederatedSketchConfig.__dataclass_fields__["rank_distribution"].default
    if args.clients_per_round is not None and args.clients_per_round > len(ranks):
        logger.warning("All %d clients take part in every round: clients_per_round=%d are not there.", len(ranks),
                       args.clients_per_round)  # fmt: skip
        args.clients_per_round = None
    args.per_device_train_clients = 1
    args.disable_tqdm = True  # a line a round, which a log can hold, in place of a bar


def placeholder_rows(roster: Roster, column: str) -> Dataset:
    """A row of two tokens for each example of the federation, that says whose it is."""
    owners = roster.owners()
    tokens = np.ones((len(owners), 2), dtype=np.int64)
    return Dataset.from_dict({"input_ids": tokens, "labels": tokens, column: owners})
