"""A comparison's YAML file and command line, read strictly."""

import dataclasses
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..common.settings import SettingsError, field_problems, is_a, sentence
from ..config.decides import told_by_fields
from ..config.federation import FederatedSketchConfig
from ..config.ranges import range_problems
from ..config.recipe import ModelArguments, RecipeArguments, parse_recipe, read_file, read_flags, read_mapping
from ..config.refusals import folder_problems
from ..methods import MethodError, method_class

RECIPE_TYPES = (RecipeArguments, FederatedSketchConfig, ModelArguments)
_IN_THE_FILE = "(In the file only.)"
# Settings of a run that a comparison sets itself, and what to do instead.
_RESERVED = {
    "seed": "list it under seeds",
    "method": "list it under methods",
    "output_dir": "set the comparison's output_dir, in which every run has a folder",
    "eval_rounds": "set eval_every",
    "upload_budget": "set upload_megabytes",
    "resume_from_checkpoint": "a comparison resumes its runs by itself, so remove it",
    "push_to_hub": "runs would share a repository; upload a finished run's folder with `hf upload`, so remove it",
}


@told_by_fields
@dataclass
class ComparisonArguments:
    """What is compared with what, for how long, and where it goes.

    Raises:
        SettingsError: a ValueError with one line for each setting that cannot work.
    """

    recipe: str | None = field(
        default=None,
        metadata={
            "decides": "result",
            "help": "Recipe that all runs start from, as seen from this file or from here.",
        },
    )
    title: str | None = field(
        default=None, metadata={"decides": "place", "help": "Heading of the report. None: the file's name."}
    )
    settings: dict | None = field(
        default=None,
        metadata={"decides": "result", "help": f"Settings of all runs, over those of the recipe. {_IN_THE_FILE}"},
    )
    methods: list[str] | None = field(
        default=None,
        metadata={
            "decides": "result",
            "help": "Methods to compare; the others are compared with the first. None: the recipe's.",
        },
    )
    seeds: list[int] | None = field(
        default=None, metadata={"decides": "result", "help": "Seeds of each. None: the recipe's."}
    )
    rank_laws: dict | None = field(
        default=None,
        metadata={
            "decides": "result",
            "help": "Name -> settings of the clients' ranks (client_ranks, or rank_distribution with min_rank and "
            f"max_rank), in place of the recipe's; every method runs under each. {_IN_THE_FILE}",
        },
    )
    cases: dict | None = field(
        default=None,
        metadata={
            "decides": "result",
            "help": f"Name -> settings, for ablations; crossed with methods and rank laws. {_IN_THE_FILE}",
        },
    )
    method_settings: dict | None = field(
        default=None,
        metadata={
            "decides": "result",
            "help": "Method -> settings that only it has, over all others. A method that needs the global rank for "
            "all clients is told its ranks here: client_ranks, rank_distribution, min_rank and max_rank of its "
            f"own, or, with null, everyone the global rank. {_IN_THE_FILE}",
        },
    )
    rounds: int | None = field(
        default=None, metadata={"decides": "result", "help": "Budget: rounds of each run. Or upload_megabytes."}
    )
    upload_megabytes: float | None = field(
        default=None,
        metadata={
            "decides": "result",
            "help": "Budget: each run ends after the round in which its clients have sent so many megabytes (10**6 "
            "bytes), at the latest after num_rounds. Or rounds.",
        },
    )
    eval_every: int | None = field(
        default=None,
        metadata={
            "decides": "server",
            "help": "Evaluate after every so many rounds and the last. None: the recipe's eval_rounds, or 10.",
        },
    )
    output_dir: str | None = field(
        default=None,
        metadata={
            "decides": "place",
            "help": "Folder of the runs, their logs, and the report. None: outputs/<file's name>.",
        },
    )
    accelerate_config: str | None = field(
        default=None,
        metadata={
            "decides": "speed",
            "help": "Start runs with accelerate and this file of its. None: one plain process.",
        },
    )

    def __post_init__(self):
        problems = range_problems(self) | folder_problems("output_dir", self.output_dir) | field_problems(self)
        for name in ("settings", "rank_laws", "cases", "method_settings"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, dict):
                problems[name] = sentence(name, "a mapping", value, "indent NAME: value below it, in the file")
        sentences = [*problems.values(), *self._list_problems(), *self._method_problems()]
        if (self.rounds is None) == (self.upload_megabytes is None):
            found = "neither" if self.rounds is None else "both"
            sentences.append(f"Expected one budget, rounds or upload_megabytes, found {found}: keep one of the two.")
        if not self.recipe:
            sentences.append(sentence("recipe", "set", self.recipe, "name the recipe that all runs start from"))
        if sentences:
            raise SettingsError(sentences)

    def _list_problems(self):
        for name, kind, what in (("methods", str, "names"), ("seeds", int, "integers")):
            value = getattr(self, name)
            if value is None:
                continue
            if not isinstance(value, list) or not value or not all(is_a(each, kind) for each in value):
                yield sentence(
                    name, f"a list of {what}", value, "write one, as in [1, 2]" if kind is int else "write one"
                )
            elif len(set(value)) < len(value):
                yield sentence(name, "all different", value, "remove the repeated ones")

    def _method_problems(self):
        # Settings may be there for methods that this time are not compared, as with --methods on the command line.
        listed = self.methods if isinstance(self.methods, list) else []
        described = self.method_settings if isinstance(self.method_settings, dict) else {}
        for name in dict.fromkeys([*listed, *described]):
            try:
                method_class(str(name))
            except MethodError as error:
                yield f"{error} (Under method_settings.)" if name not in listed else str(error)


@dataclass(frozen=True)
class Comparison:
    """A comparison as its file and the command line give it.

    Args:
        name: of the file, without its ending.
        base: settings of the recipe, under those of all mappings.
        common, line: settings of all runs: the file's `settings`, and over them the command line's.
        rank_laws, cases, methods: name -> settings, in the file's order; one without settings where none are given.
    """

    name: str
    arguments: ComparisonArguments
    base: dict[str, Any]
    common: dict[str, Any]
    line: dict[str, Any]
    rank_laws: dict[str, dict[str, Any]]
    cases: dict[str, dict[str, Any]]
    methods: dict[str, dict[str, Any]]
    seeds: tuple[int, ...]
    output_dir: Path


def parse_comparison(args: list[str] | None = None) -> Comparison:
    """Read `--config FILE` and, over it, the other arguments: keys of a comparison, and settings of all runs.

    Raises:
        SettingsError: a ValueError with one line for each problem.
    """
    own, others = _sort_flags(sys.argv[1:] if args is None else args)
    arguments = parse_recipe((ComparisonArguments,), own)[0]
    path = Path(_config_of(own))
    reader = _Reader([])
    recipe = _find(arguments.recipe, path.parent, "recipe", reader.problems)
    if arguments.accelerate_config:
        arguments.accelerate_config = str(
            _find(arguments.accelerate_config, path.parent, "accelerate_config", reader.problems)
        )
    base = reader.read(read_file, str(recipe)) if recipe else {}
    line = reader.read(read_flags, others)
    common = reader.mapping(arguments.settings, "under settings")
    laws = reader.mappings(arguments.rank_laws, "rank_laws")
    cases = reader.mappings(arguments.cases, "cases")
    own_settings = reader.mappings(arguments.method_settings, "method_settings")
    for where, found in (("on the command line", line), ("under settings", common)):
        reader.reserved(found, where, arguments.rounds is not None)
    for where, group in (("rank_laws", laws), ("cases", cases), ("method_settings", own_settings)):
        for name, found in group.items():
            reader.reserved(found, f"under {where}: {name}", arguments.rounds is not None)
            for key in found.keys() & line.keys():
                remedy = f"leave it out, or change it in the file under {where}: {name}"
                reader.problems.append(sentence(f"{key} on the command line", "one of no case", line[key], remedy))
    if reader.problems:
        raise SettingsError(reader.problems)
    return Comparison(
        name=path.stem,
        arguments=arguments,
        base=base,
        common=common,
        line=line,
        rank_laws=laws or {"": {}},
        cases=cases or {"": {}},
        methods={name: own_settings.get(name, {}) for name in arguments.methods or [base.get("method", "fslora")]},
        seeds=tuple(arguments.seeds or [base.get("seed", 42)]),
        output_dir=Path(arguments.output_dir or f"outputs/{path.stem}"),
    )


def _sort_flags(args: list[str]) -> tuple[list[str], list[str]]:
    """The words of the command line that are a comparison's, and those that are settings of the runs."""
    names = {each.name for each in dataclasses.fields(ComparisonArguments)} | {"config", "help"}
    sorted_words: tuple[list[str], list[str]] = [], []
    mine = True
    for word in args:
        if word.startswith("--"):
            mine = word[2:].split("=")[0].replace("-", "_") in names
        sorted_words[0 if mine or word == "-h" else 1].append(word)
    return sorted_words


def _config_of(own: list[str]) -> str:
    for position, word in enumerate(own):
        if word.startswith("--config="):
            return word.removeprefix("--config=")
        if word == "--config":
            return own[position + 1]
    return "comparison.yaml"


def _find(name: str, beside: Path, what: str, problems: list[str]) -> Path | None:
    """A file named as seen from the working directory, or from the folder `beside`."""
    found = next((path for path in (Path(name), beside / name) if os.path.isfile(path)), None)  # also of odd names
    if found is None:
        places = f"a file here or in {os.path.normpath(beside)}"
        problems.append(sentence(what, places, name, "correct the path"))
    return found


class _Reader:
    """Reads settings of runs from several places and keeps all that is wrong with them in `problems`."""

    def __init__(self, problems: list[str]):
        self.problems = problems

    def read(self, function: Any, *source: Any) -> dict[str, Any]:
        try:
            return function(RECIPE_TYPES, *source)
        except SettingsError as error:
            self.problems += error.problems
            return {}

    def mapping(self, values: dict | None, where: str) -> dict[str, Any]:
        if values is not None and not isinstance(values, dict):
            remedy = "indent settings below it, or {} for none"
            self.problems.append(sentence(f"what stands {where}", "a mapping of settings to values", values, remedy))
            return {}
        return self.read(read_mapping, values or {}, where)

    def mappings(self, group: dict | None, where: str) -> dict[str, dict[str, Any]]:
        return {str(name): self.mapping(values, f"under {where}: {name}") for name, values in (group or {}).items()}

    def reserved(self, values: dict[str, Any], where: str, equal_rounds: bool) -> None:
        reserved = _RESERVED | ({"num_rounds": "set rounds"} if equal_rounds else {})
        self.problems += [
            sentence(f"{name} {where}", "left to the comparison", values[name], reserved[name])
            for name in values
            if name in reserved
        ]
