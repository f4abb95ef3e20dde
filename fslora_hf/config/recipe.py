"""Recipes: one YAML file, read strictly into dataclasses, which the command line overrides."""

import argparse
import difflib
import os
import re
import sys
from collections.abc import Callable, Collection, Iterable, Set
from dataclasses import dataclass, field, fields
from typing import Any

from trl import ModelConfig, TrlParser

from ..common.foreign_text import foreign_text
from ..common.masking import is_secret_name, scrub
from ..common.settings import SettingsError, field_problems, is_a, kind_of, named, said, sentence
from ..common.strict_yaml import YamlFileError, read_yaml
from ..data.commonsense import check_tasks
from ..data.partition import SCHEME_OPTIONS
from .ranges import range_problems
from .variables import variable_problems

# Keys of older or other recipes, whose new name is not the most similar one.
_RENAMED = {
    "dataset_name": "dataset",
    "evaluation_strategy": "eval_rounds",
    "learning_rate_scheduler": "lr_scheduler_type",
    "max_seq_length": "max_length",
    "torch_dtype": "dtype",
    "warmup_ratio": "warmup_steps",
}


@dataclass
class RecipeArguments:
    """Which rows a recipe trains on and how they are split among clients.

    Raises:
        SettingsError: a ValueError with one line for each setting that cannot work.
    """

    dataset: str | None = field(
        default=None,
        metadata={
            "help": "miniature (the packaged rows), commonsense (files in data_dir, or without it the originals on "
            "the Hub), a local file or folder of rows, or a data set of the Hub. None: commonsense if data_dir is "
            "given, else miniature."
        },
    )
    data_dir: str | None = field(
        default=None,
        metadata={"help": "Folder of the commonsense rows: <data_dir>/<task>/{train,test}.json. None: from the Hub."},
    )
    tasks: list[str] | None = field(
        default=None,
        metadata={"help": "Tasks to use, of rows that have an instruction and an answer. None: all there are."},
    )
    train_rows_per_task: int | None = field(
        default=None, metadata={"help": "Train on at most so many rows of each task. None: all."}
    )
    eval_rows_per_task: int | None = field(
        default=None, metadata={"help": "Evaluate on at most so many rows of each task. None: all."}
    )
    partition: str = field(
        default="task_dirichlet",
        metadata={
            "help": "How rows are split among clients; column takes the clients of partition_column.",
            "choices": tuple(SCHEME_OPTIONS),
        },
    )
    num_clients: int | None = field(
        default=None, metadata={"help": "Clients to split the rows among; column counts them itself."}
    )
    partition_column: str | None = field(
        default=None,
        metadata={"help": "Column of labels to split by (None: task); for column, the one that says whose a row is."},
    )
    dirichlet_alpha: float | None = field(
        default=None,
        metadata={"help": "Concentration of the Dirichlet schemes: the smaller, the less alike. None: 0.1."},
    )
    shards_per_client: int | None = field(
        default=None, metadata={"help": "Shards of each client under sorted_shards. None: 2."}
    )

    def __post_init__(self):
        self.tasks = [self.tasks] if isinstance(self.tasks, str) else self.tasks
        problems = field_problems(self) | range_problems(self)
        if self.dataset is None:
            self.dataset = "miniature" if self.data_dir is None else "commonsense"
        sentences = [*problems.values(), *self._data_problems(problems.keys())]
        if "partition" not in problems:
            sentences += self._partition_problems()
        if sentences:
            raise SettingsError(sentences)

    @property
    def partition_options(self) -> dict[str, Any]:
        """What `partition` takes beside the scheme and the number of clients; None where it does not apply."""
        by_label = "column" in SCHEME_OPTIONS[self.partition] and self.partition != "column"
        column = "task" if by_label and self.partition_column is None else self.partition_column
        return {"column": column, "alpha": self.dirichlet_alpha, "shards_per_client": self.shards_per_client}

    def _data_problems(self, known_wrong: Set[str]) -> Iterable[str]:
        if self.dataset != "commonsense" and self.data_dir is not None:
            remedy = "remove it, or set dataset to commonsense"
            yield sentence("data_dir", f"unset for dataset {self.dataset}", self.data_dir, remedy)
        if self.tasks is not None and "tasks" not in known_wrong and self.dataset in ("miniature", "commonsense"):
            try:
                check_tasks(self.tasks)
            except ValueError as error:
                yield str(error)

    def _partition_problems(self) -> Iterable[str]:
        taken = SCHEME_OPTIONS[self.partition]
        options = {"partition_column": "column", "dirichlet_alpha": "alpha", "shards_per_client": "shards_per_client"}
        for name, option in options.items():
            if option not in taken and getattr(self, name) is not None:
                remedy = "remove it or choose another partition"
                yield sentence(name, f"unset for partition {self.partition}", getattr(self, name), remedy)
        if is_a(self.dirichlet_alpha, float) and not 1e-6 <= self.dirichlet_alpha <= 1e6:
            remedy = "for an even split choose partition iid"
            yield sentence("dirichlet_alpha", "from 1e-6 to 1e6", self.dirichlet_alpha, remedy)
        if self.partition == "column" and self.partition_column is None:
            yield sentence("partition_column", "set for partition column", None, "name the column with the clients")
        if self.partition != "column" and self.num_clients is None:
            yield sentence(
                "num_clients", f"set for partition {self.partition}", None, "say how many clients there are"
            )


@dataclass
class ModelArguments(ModelConfig):
    """TRL's `ModelConfig` for the one kind of adapter there is here: plain LoRA, so `use_peft` is on by default.

    Raises:
        SettingsError: a ValueError with one line for each setting that cannot work.
    """

    use_peft: bool = field(default=True, metadata={"help": "Always true: clients train LoRA adapters."})

    def __post_init__(self):
        # A text here is PEFT's: all-linear, or a pattern of modules' whole paths.
        text = {"lora_target_modules"} if isinstance(self.lora_target_modules, str) else ()
        problems = field_problems(self, besides=text) | range_problems(self)
        refused = {
            "use_peft": (True, "clients train LoRA adapters, so remove it"),
            "use_dora": (False, "clients hold plain LoRA pairs, so remove it"),
            "lora_modules_to_save": (None, "clients train LoRA pairs only, so remove it"),
            "lora_target_parameters": (None, "LoRA pairs sit in linear modules, so name those in lora_target_modules"),
            "lora_task_type": ("CAUSAL_LM", "the trainer fine-tunes causal language models, so remove it"),
        }
        for name, (works, remedy) in refused.items():
            if getattr(self, name) != works:
                expected = "unset" if works is None else f"left at {works!r}"
                problems[name] = sentence(name, expected, getattr(self, name), remedy)
        if not self.model_name_or_path:
            remedy = "name a model of the Hub or a folder that holds one"
            problems["model_name_or_path"] = sentence("model_name_or_path", "set", self.model_name_or_path, remedy)
        if is_a(self.lora_dropout, float) and not 0 <= self.lora_dropout < 1:
            remedy = "choose a share such as 0.1"
            problems["lora_dropout"] = sentence("lora_dropout", "at least 0 and below 1", self.lora_dropout, remedy)
        if self.load_in_4bit is True and self.load_in_8bit is True:
            problems["load_in_8bit"] = sentence("load_in_8bit", "off beside load_in_4bit", True, "keep one of the two")
        if self.load_in_4bit is True and self.dtype in (None, "auto"):
            remedy = "set dtype to bfloat16, in which 4-bit weights are then multiplied"
            problems["dtype"] = sentence("dtype", "a precision beside load_in_4bit", self.dtype, remedy)
        if problems:
            raise SettingsError(list(problems.values()))
        targets = self.lora_target_modules
        super().__post_init__()
        # ModelConfig makes [q_proj] the text q_proj, which PEFT takes for a pattern of a module's whole path.
        if isinstance(targets, list) and len(targets) == 1 and re.fullmatch(r"[\w.]+", targets[0]):
            self.lora_target_modules = targets


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
