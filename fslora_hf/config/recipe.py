"""Recipes: one YAML file, read strictly into dataclasses, which the command line overrides."""

import argparse
import difflib
import os
import sys
from collections.abc import Callable, Collection, Iterable
from dataclasses import fields
from typing import Any

from trl import TrlParser

from ..common.foreign_text import foreign_text
from ..common.masking import is_secret_name, scrub
from ..common.settings import SettingsError, is_a, kind_of, named, said, sentence
from ..common.strict_yaml import YamlFileError, read_yaml
from .arguments import ModelArguments, RecipeArguments
from .variables import variable_problems

__all__ = [
    "ModelArguments",
    "RecipeArguments",
    "build_settings",
    "parse_recipe",
    "read_file",
    "read_flags",
    "read_mapping",
]

# Keys of older or other recipes, whose new name is not the most similar one.
_RENAMED = {
    "dataset_name": "dataset",
    "evaluation_strategy": "eval_rounds",
    "learning_rate_scheduler": "lr_scheduler_type",
    "max_seq_length": "max_length",
    "torch_dtype": "dtype",
    "warmup_ratio": "warmup_steps",
}


class _Parser(TrlParser):
    """TRL's parser, with errors raised instead of printed with 300 lines of usage."""

    def error(self, message: str):
        raise ValueError(message)


def parse_recipe(dataclass_types: Iterable[type], args: list[str] | None = None) -> tuple[Any, ...]:
    """Read a recipe: the file named by `--config` and, over it, the other command-line arguments.

    As TRL's parser: a file's keys are fields of the dataclasses, its `env` sets environment variables, and texts are
    converted to the type of their field (YAML reads `1e-4` as a text). Unlike it, whatever is wrong is told at once:
    keys that no dataclass has, each with the nearest one that exists, and all that the dataclasses object to.

    Args:
        dataclass_types: dataclasses that share no field.
        args: the command line; None takes that of the process.

    Returns:
        One instance of each of `dataclass_types`, in order.

    Raises:
        SettingsError: a ValueError with one line for each problem.
    """
    types = list(dataclass_types)
    problems: list[str] = []
    converters, given = _command_line(_parser(types), sys.argv[1:] if args is None else args, problems)
    path = given.pop("config", None)
    values = ({} if path is None else _from_file(path, converters, problems)) | given
    return _build(types, values, converters, problems)


def read_flags(dataclass_types: Iterable[type], args: list[str]) -> dict[str, Any]:
    """The settings that a command line names, as values of their fields; whether they work together is not checked.

    Raises:
        SettingsError: a setting that no dataclass has, or a text that cannot be a value of its field.
    """
    problems: list[str] = []
    converters, given = _command_line(_parser(list(dataclass_types)), args, problems)
    given.pop("config", None)
    return _converted(given, converters, "on the command line", problems)


def read_file(dataclass_types: Iterable[type], path: str) -> dict[str, Any]:
    """The settings of a recipe file, as `read_flags`; its `env` sets environment variables."""
    problems: list[str] = []
    known = _known(dataclass_types)
    return _converted(_from_file(path, known, problems), known, f"in {path}", problems)


def read_mapping(dataclass_types: Iterable[type], values: dict[Any, Any], where: str) -> dict[str, Any]:
    """The settings of a mapping out of a larger file, as `read_flags`; `where` says which one, as in `under cases`."""
    known = _known(dataclass_types)
    problems = [_unknown(name, known, where) for name in values if name not in known]
    return _converted({name: values[name] for name in values if name in known}, known, where, problems)


def build_settings(dataclass_types: Iterable[type], values: dict[str, Any]) -> tuple[Any, ...]:
    """One instance of each dataclass from settings that `read_flags` and its like have read.

    Raises:
        SettingsError: a ValueError with one line for each problem.
    """
    types = list(dataclass_types)
    known = _known(types)
    problems = [_unknown(name, known, "in a recipe") for name in values if name not in known]
    return _build(types, {name: values[name] for name in values if name in known}, known, problems)


def _build(
    types: list[type], values: dict[str, Any], converters: dict[str, Callable | None], problems: list[str]
) -> tuple[Any, ...]:
    """The instances; all that is wrong with the settings is raised together with the `problems` known so far."""
    unconverted = {name for name in values if not _convert(values, name, converters[name])}
    results = []
    for each in types:
        own = {field.name for field in fields(each) if field.init} & values.keys()
        try:
            results.append(each(**{name: values[name] for name in own}))
        except SettingsError as error:
            problems += error.problems
        except (ValueError, TypeError) as error:
            remedy = f"Expected settings that {each.__name__} takes, found '{said(error)}': correct what it names."
            problems.append(str(error) if str(error).startswith("Expected ") else remedy)
        else:
            known = f"a value that {each.__name__} can read"
            problems += [sentence(name, known, values[name], "correct it") for name in sorted(own & unconverted)]
    defaults = {field.name: field.default for each in types for field in fields(each)}
    problems += _joint_problems(defaults | values)
    if problems:
        raise SettingsError(problems)
    return tuple(results)


def _parser(types: list[type]) -> _Parser:
    parser = _Parser(types, allow_abbrev=False)
    parser.add_argument("--config", metavar="FILE", help="YAML file of settings, which the other arguments override.")
    return parser


def _known(dataclass_types: Iterable[type]) -> dict[str, Callable | None]:
    """Name of every setting -> what converts its text."""
    return _command_line(_parser(list(dataclass_types)), [], [])[0]


def _converted(
    values: dict[str, Any], converters: dict[str, Callable | None], where: str, problems: list[str]
) -> dict[str, Any]:
    """The values with texts as values of their fields; raises the `problems` so far and what cannot be converted."""
    values = dict(values)
    problems += [
        sentence(f"{name} {where}", "a value that its field can hold", values[name], "correct it")
        for name in values
        if not _convert(values, name, converters[name])
    ]
    if problems:
        raise SettingsError(problems)
    return values


def _command_line(
    parser: _Parser, args: list[str], problems: list[str]
) -> tuple[dict[str, Callable | None], dict[str, Any]]:
    """What converts the text of each field, and the texts that the command line gives."""
    if {"-h", "--help"} & set(args):
        parser.print_help()
        raise SystemExit(0)
    converters: dict[str, Callable | None] = {}
    for action in parser._actions:
        # Conversion and choices are left to later, when all problems can be told together.
        converters[action.dest] = converters.get(action.dest) or action.type
        action.type, action.choices, action.required = None, None, False
    absent = object()
    try:
        given, unknown = parser.parse_known_args(args, argparse.Namespace(**dict.fromkeys(converters, absent)))
    except ValueError as error:  # from here on, flags and values cannot be told apart
        raise SettingsError([f"Expected a value after its flag, found {said(error)}: write --name value."]) from None
    del converters["help"], converters["config"]
    flags = [text for text in unknown if text.startswith("--")]
    problems += [_unknown(flag.split("=")[0].lstrip("-"), converters, "on the command line") for flag in flags]
    if unknown and not flags:  # words of no flag; after a token they may be its end
        told = any(is_secret_name(text.split("=")[0]) for text in args if text.startswith("--"))
        words = "a word that follows no flag" if told else foreign_text(" ".join(unknown), 60)
        problems.append(f"Expected only settings that exist on the command line, found {words}: write --name value.")
    return converters, {name: value for name, value in vars(given).items() if value is not absent}


def _from_file(path: str, known: Collection[str], problems: list[str]) -> dict[str, Any]:
    """The settings of a YAML file, once its `env` is set; what is wrong with its keys is added to `problems`."""
    where = scrub(str(path))
    try:
        values, twice = read_yaml(path)
    except YamlFileError as error:
        raise SettingsError([f"Expected a YAML file at {where}, found {error}: name another or correct it."]) from None
    if not isinstance(values, dict):  # a line without its colon may be one with a token
        remedy = "write lines such as num_rounds: 10"
        raise SettingsError(
            [f"Expected {where} to be a YAML mapping of settings to values, found {kind_of(values)}: {remedy}."]
        )
    problems += [f"Expected {named(key)} once in {where}, found it more often: keep one." for key in twice]
    environment = values.pop("env", None)
    found = list(variable_problems(environment))
    if environment and not found:
        os.environ.update({name: str(value) for name, value in environment.items()})
    problems += found
    problems += [_unknown(name, known, f"in {where}") for name in values if name not in known]
    return {name: value for name, value in values.items() if name in known}


def _unknown(name: Any, known: Collection[str], where: str) -> str:
    key = name if isinstance(name, str) else str(name)
    near = _RENAMED.get(key) or next(iter(difflib.get_close_matches(key[:60], known, n=1)), None)
    remedy = f"did you mean {near}?" if near else "remove it."
    return f"Expected only settings that exist {where}, found {named(name)}: {remedy}"


def _convert(values: dict[str, Any], name: str, convert: Callable | None) -> bool:
    """Turn texts into values of their field, in place; False if one cannot be."""
    value = values[name]
    texts = isinstance(value, str) or (isinstance(value, list) and any(isinstance(item, str) for item in value))
    if not texts or convert is None:
        return True
    try:
        values[name] = convert(value) if isinstance(value, str) else [convert(str(item)) for item in value]
    except (ValueError, TypeError, argparse.ArgumentTypeError):
        return False
    return True


def _joint_problems(values: dict[str, Any]) -> Iterable[str]:
    """Settings of different dataclasses that do not go together."""
    clients, ranks = values.get("num_clients"), values.get("client_ranks")
    ranks = ranks if isinstance(ranks, list) and all(is_a(rank, int) for rank in ranks) else []
    global_rank = ("lora_r", values.get("lora_r"))
    for name, value, (limit_name, limit) in (
        ("max_rank", values.get("max_rank"), global_rank),
        ("client_ranks", max(ranks, default=None), global_rank),
        ("clients_per_round", values.get("clients_per_round"), ("num_clients", clients)),
    ):
        if is_a(value, int) and is_a(limit, int) and value > limit:
            yield sentence(name, f"at most {limit_name} ({limit})", value, f"lower it or raise {limit_name}")
    if ranks and is_a(clients, int) and 0 < clients != len(ranks):
        remedy = "give as many ranks as clients"
        yield f"Expected client_ranks to be of length num_clients ({clients}), found {len(ranks)}: {remedy}."
