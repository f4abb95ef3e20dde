"""Which runs a comparison means, each checked as its own recipe before the first one starts."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from ..common.masking import find_secrets
from ..common.settings import SettingsError, sentence
from ..config.decides import where
from ..config.federation import FederatedSketchConfig
from ..config.recipe import ModelArguments, RecipeArguments, build_settings
from ..methods import method_class
from ..storage.result_files import slug
from .arguments import RECIPE_TYPES, Comparison

# Who has which rank is said by these together: a mapping that names one of them replaces all of those below it.
RANKS = ("client_ranks", "rank_distribution", "min_rank", "max_rank")
# How rows are dealt to clients, which a case may vary.
PARTITION = where(RECIPE_TYPES, lambda each: each.compared == "split")
# What must be the same in all runs: other rows, another model or another way to ask are no comparison.
ALIKE = where(RECIPE_TYPES, lambda each: each.compared == "alike")


@dataclass(frozen=True)
class Variant:
    """A line of the comparison's table: a method in a case under a rank law.

    Args:
        label: what tells it from the others, for people.
        name: the same for files.
        reference: position of the variant that it is compared with, None for one that others are compared with.
    """

    case: str
    law: str
    method: str
    label: str
    name: str
    reference: int | None


@dataclass(frozen=True)
class Run:
    """One variant with one seed: the settings of its recipe, and what they are read as."""

    name: str
    variant: int
    seed: int
    settings: dict[str, Any]
    recipe: RecipeArguments
    args: FederatedSketchConfig
    model: ModelArguments

    def setting(self, name: str) -> Any:
        """The value of any setting of the recipe, its default where it is not given."""
        return next(getattr(part, name) for part in (self.recipe, self.args, self.model) if hasattr(part, name))


def variants_of(comparison: Comparison) -> list[Variant]:
    """In the file's order. A method is compared with the first method of its own case and rank law; where there is
    one method only, each variant is compared with the first of all."""
    several = [len(names) > 1 for names in (comparison.cases, comparison.rank_laws, comparison.methods)]
    found: list[Variant] = []
    for position, parts in enumerate(product(comparison.cases, comparison.rank_laws, comparison.methods)):
        told = [part for part, tell in zip(parts, several, strict=True) if tell] or [parts[-1]]
        first = position - position % len(comparison.methods) if several[-1] else 0
        reference = None if first == position else first
        found.append(Variant(*parts, ", ".join(told), slug(told), reference))
    return found


def runs_of(comparison: Comparison) -> tuple[list[Variant], list[Run]]:
    """The variants, and their runs: seed by seed, so that an early look compares all variants.

    Raises:
        SettingsError: a run's recipe cannot work, a method would get ranks that it cannot have, or runs would differ
            in data or scoring. All problems are told together.
    """
    variants = variants_of(comparison)
    repeated = [name for name, count in Counter(variant.name for variant in variants).items() if count > 1]
    problems: dict[str, list[str]] = {}
    for name in repeated:
        text = f"Expected names that differ in letters and digits, found several that give {name!r}: rename one."
        problems[text] = []
    runs = []
    for seed, position in product(comparison.seeds, range(len(variants))):
        name = f"{variants[position].name}-seed{seed}"
        settings = _settings(comparison, variants[position], seed, name)
        try:
            run = Run(name, position, seed, settings, *build_settings(RECIPE_TYPES, settings))
        except SettingsError as error:
            found = error.problems
        else:
            runs.append(run)
            found = list(_problems(run, comparison.arguments.upload_megabytes is not None))
        for text in found:
            problems.setdefault(text, []).append(name)
    sentences = [*(_with_names(text, names) for text, names in problems.items()), *_differences(runs)]
    if sentences:
        raise SettingsError(sentences)
    return variants, runs


def _settings(comparison: Comparison, variant: Variant, seed: int, name: str) -> dict[str, Any]:
    """The recipe of one run: each mapping over those before it, and what the comparison sets itself over all."""
    arguments, settings = comparison.arguments, dict(comparison.base)
    layers = comparison.common, comparison.line, comparison.rank_laws[variant.law], comparison.cases[variant.case]
    for layer in (*layers, comparison.methods[variant.method]):
        if layer.keys() & set(RANKS):
            settings = {key: value for key, value in settings.items() if key not in RANKS}
        settings |= layer
    if arguments.rounds is not None:
        settings["num_rounds"] = arguments.rounds
        settings.pop("upload_budget", None)  # a recipe's own
    else:
        settings["upload_budget"] = arguments.upload_megabytes
    settings.pop("hub_token", None)  # runs push nothing, and their recipes are written down
    return settings | {
        "method": variant.method,
        "seed": seed,
        "output_dir": str(comparison.output_dir / "runs" / name),
        "eval_rounds": arguments.eval_every or settings.get("eval_rounds") or 10,
        "push_to_hub": False,  # several runs would write over each other in one repository
        "disable_tqdm": settings.get("disable_tqdm", True),  # a bar does not belong into a log
    }


def _problems(run: Run, equal_bytes: bool) -> Iterator[str]:
    """What a recipe may say and a comparison may not."""
    for name in find_secrets(run.settings):
        yield (
            f"Expected no secret in a comparison, which writes the recipes of its runs down, found one at {name}: "
            "remove it, and log in with 'hf auth login' or set HF_TOKEN."
        )
    if method_class(run.args.method).full_rank_only and not _all_at_global_rank(run):
        yield (
            f"Expected every client to have the global rank {run.model.lora_r} with method={run.args.method}, found "
            f"{_told_ranks(run)}: say under method_settings which ranks it gets instead, for example "
            "{client_ranks: null} for the global rank, or {client_ranks: null, lora_r: 4} for a smaller one."
        )
    if run.args.save_rounds == 0:
        remedy = "set it, so that a run that was stopped can go on"
        yield sentence("save_rounds", "above 0 in a comparison", 0, remedy)
    schedule = run.args.lr_scheduler_type.value
    if equal_bytes and not schedule.startswith("constant"):
        remedy = (
            "set constant: a rate that falls with num_rounds would have fallen unequally far when the bytes are sent"
        )
        yield sentence("lr_scheduler_type", "constant or constant_with_warmup at equal bytes", schedule, remedy)


def _all_at_global_rank(run: Run) -> bool:
    rank, ranks = run.model.lora_r, run.args.client_ranks
    if ranks is not None:
        return set(ranks) == {rank}
    lowest = run.args.max_rank if run.args.rank_distribution == "homogeneous" else run.args.min_rank or 1
    return (lowest or rank) == rank


def _told_ranks(run: Run) -> str:
    given = {name: run.setting(name) for name in RANKS if run.setting(name) is not None}
    return ", ".join(f"{name} {value}" for name, value in given.items())


def _with_names(text: str, runs: Sequence[str]) -> str:
    if not runs:
        return text
    more = "" if len(runs) == 1 else f" and {len(runs) - 1} more"
    return f"In {runs[0]}{more}: {text}"


def _differences(runs: Sequence[Run]) -> Iterator[str]:
    """Settings of data and scoring in which runs differ."""
    for name in ALIKE:
        for run in runs[1:]:
            first, found = runs[0].setting(name), run.setting(name)
            if first != found:
                yield (
                    f"Expected {name} to be the same in all runs, found {first!r} in {runs[0].name} and {found!r} in "
                    f"{run.name}: compare runs on the same rows, with the same model and scoring."
                )
                break
