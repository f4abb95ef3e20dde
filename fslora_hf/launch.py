"""From a recipe to a trained adapter: what the scripts in recipes/ have in common."""

import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from datasets import Dataset
from transformers import PretrainedConfig, TrainerCallback
from transformers.utils.peft_utils import find_adapter_config_file
from trl import get_peft_config, get_quantization_config

from .common.foreign_text import foreign_text
from .common.masking import scrub
from .common.processes import rank
from .common.settings import SettingsError
from .config.federation import FederatedSketchConfig
from .config.recipe import ModelArguments, RecipeArguments
from .data.partition import partition
from .data.sources import load_rows
from .reports.ledger import ledger_table, plot_ledger, read_ledger, totals
from .rounds.watch import RunLost
from .storage.disk_errors import WriteError
from .storage.locks import FolderInUse, held
from .trainers.resume import OccupiedError, refuse_occupied
from .trainers.sft import FederatedSketchTrainer
from .updates.movement import NeverTrained

Trained = TypeVar("Trained", bound=FederatedSketchTrainer)
_OUR_WORDS = ("Expected ", "The run cannot start:")
FIGURE_NAME = "rounds.png"  # in a run's folder, written when it has ended well


def held_out_rows(recipe: RecipeArguments, seed: int) -> Dataset | None:
    """The rows a recipe is evaluated on, None if its data set holds none out."""
    source = {"data_dir": recipe.data_dir, "tasks": recipe.tasks, "seed": seed}
    return load_rows(recipe.dataset, "test", rows_per_task=recipe.eval_rows_per_task, **source)


def training_rows(recipe: RecipeArguments, args: FederatedSketchConfig) -> Dataset:
    """The rows a recipe trains on, split among its clients."""
    source = {"data_dir": recipe.data_dir, "tasks": recipe.tasks, "seed": args.seed}
    train = load_rows(recipe.dataset, "train", rows_per_task=recipe.train_rows_per_task, **source)
    if recipe.partition != "column" or recipe.partition_column != args.client_id_column:
        train = partition(
            train,
            recipe.partition,
            recipe.num_clients,
            seed=args.seed,
            client_id_column=args.client_id_column,
            min_examples=args.min_examples,
            **recipe.partition_options,
        )
    return train


def build_trainer(
    recipe: RecipeArguments,
    args: FederatedSketchConfig,
    model_args: ModelArguments,
    callbacks: Sequence[TrainerCallback] = (),
    *,
    trainer_class: Callable[..., Trained] = FederatedSketchTrainer,
    rows: Dataset | None = None,
    evaluates: bool = True,
) -> Trained:
    """The trainer that a recipe describes: its rows split among clients, its model loaded.

    Args:
        trainer_class: makes the trainer, as FederatedSketchTrainer does.
        rows: to train on in place of the recipe's, their clients named.
        evaluates: whether the recipe's held-out rows are loaded.
    """
    try:
        return _build(recipe, args, model_args, callbacks, trainer_class, rows, evaluates)
    except (ValueError, OSError) as error:
        error.is_told = str(error).startswith(_OUR_WORDS)  # before a step of training, and so in need of no traceback
        raise


def _build(
    recipe: RecipeArguments,
    args: FederatedSketchConfig,
    model_args: ModelArguments,
    callbacks: Sequence[TrainerCallback],
    trainer_class: Callable[..., Trained],
    rows: Dataset | None,
    evaluates: bool,
) -> Trained:
    train = training_rows(recipe, args) if rows is None else rows
    check_model(model_args, args)
    args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(args.model_init_kwargs or {}),
    }
    trainer = trainer_class(
        model=model_args.model_name_or_path,
        args=args,
        train_dataset=train,
        eval_dataset=held_out_rows(recipe, args.seed) if evaluates else None,
        peft_config=get_peft_config(model_args),
        quantization_config=get_quantization_config(model_args),
        callbacks=list(callbacks),
    )
    trainer.card_facts = _card_facts(recipe, len(train))
    return trainer


def check_model(model_args: ModelArguments, args: FederatedSketchConfig) -> None:
    """See that there is a base model, before the trainer is built.

    Raises:
        SettingsError: there is none at the path or of the name that is given.
    """
    name, options = model_args.model_name_or_path, args.model_init_kwargs or {}
    source = {key: options[key] for key in ("token", "subfolder", "cache_dir") if key in options}
    source["revision"] = model_args.model_revision
    if "gguf_file" in options:  # beside which no configuration need lie
        return
    try:
        PretrainedConfig.get_config_dict(name, **source)
    except OSError as error:
        if find_adapter_config_file(name, **source) is None:  # which names its base
            raise SettingsError(
                [
                    "Expected model_name_or_path to be a folder with a model or the name of one on the Hub, found "
                    f"{foreign_text(name)!r} ({foreign_text(scrub(str(error)))}): correct it, or log in if it asks."
                ]
            ) from None


def _card_facts(recipe: RecipeArguments, rows: int) -> dict[str, Any]:
    """What the model card tells of the recipe."""
    named = [] if recipe.dataset in ("miniature", "commonsense") or Path(recipe.dataset).exists() else [recipe.dataset]
    return {
        "data": f"{recipe.dataset}, {rows:,} rows",
        "datasets": named,
        "command": shlex.join(["accelerate", "launch", *sys.argv]),
        "commonsense": recipe.dataset == "commonsense",
    }


@contextmanager
def claimed(output_dir: str, anew: bool = False) -> Iterator[None]:
    """For a script: its run's folder, from before the model is loaded until all of the run is in it.

    With `anew`, there must be no run in it yet. What keeps a run from beginning or from ending well is told in one
    sentence, with exit code 1.
    """
    try:
        with held(output_dir):
            if anew:
                refuse_occupied(Path(output_dir), resuming="--resume_from_checkpoint true")
            yield
    except (FolderInUse, NeverTrained, OccupiedError, RunLost, WriteError) as error:
        sys.exit(str(error) if rank() == 0 else 1)
    except (ValueError, OSError) as error:
        if not getattr(error, "is_told", False):
            raise
        sys.exit(str(error) if rank() == 0 else 1)


def finish(trainer: FederatedSketchTrainer, evaluation: dict[int, float] | None = None) -> str:
    """Write the final adapter and the figure of the rounds beside the ledger; returns the ledger as a table.

    `evaluation` maps a number of finished rounds to the held-out loss then, for the figure; None takes what the
    trainer evaluated on its way.
    """
    with held(trainer.args.output_dir):
        trainer.save_model(trainer.args.output_dir, _internal_call=True)  # the rounds are pushed already
        return _report(trainer, evaluation) if trainer.is_world_process_zero() else ""


def _report(trainer: FederatedSketchTrainer, evaluation: dict[int, float] | None) -> str:
    if evaluation is None:
        history = trainer.state.log_history
        evaluation = {round(row["epoch"]): row["eval_loss"] for row in history if "eval_loss" in row}
    rounds = read_ledger(trainer.ledger_path)
    output_dir = Path(trainer.args.output_dir)
    plot_ledger(rounds, output_dir / FIGURE_NAME, evaluation, title=f"{trainer.args.method}, {len(rounds)} rounds")
    updates, refused = sum(len(row["clients"]) for row in rounds), totals(rounds)["refused"]
    table = ledger_table(rounds, every=max(1, len(rounds) // 20))
    table += f"\n\n{updates - refused:,} of {updates:,} updates were folded into the global adapter."
    table += f"\n\n{trainer.best_told}" if trainer.best_told else ""
    pushed = trainer.publisher and trainer.publisher.report
    return table if pushed is None else f"{table}\n\nOn the Hub\n{pushed}"


def missing_rounds(trainer: FederatedSketchTrainer) -> str | None:
    """A sentence on the rounds that should be on the Hub and are not, None if there are none."""
    pushed = trainer.publisher and trainer.publisher.report
    if pushed is None or not pushed.missing:
        return None
    return (
        f"Expected every chosen round on the Hub, found {len(pushed.missing)} missing (rounds "
        f"{', '.join(map(str, pushed.missing))}): send them with `python recipes/push.py {trainer.args.output_dir}`, "
        "or do what the table above says."
    )
