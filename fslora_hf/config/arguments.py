"""What a recipe says beside the configuration of its run: which rows, dealt how, and which model and adapter."""

import re
from collections.abc import Iterable, Set
from dataclasses import dataclass, field
from typing import Any

from trl import ModelConfig

from ..common.settings import SettingsError, field_problems, is_a, sentence
from ..data.commonsense import check_tasks
from ..data.partition import SCHEME_OPTIONS
from .decides import told_by_fields
from .ranges import range_problems


@told_by_fields
@dataclass
class RecipeArguments:
    """Which rows a recipe trains on and how they are split among clients.

    Raises:
        SettingsError: a ValueError with one line for each setting that cannot work.
    """

    dataset: str | None = field(
        default=None,
        metadata={
            "decides": "result",
            "entry": "data",
            "compared": "alike",
            "help": "miniature (the packaged rows), commonsense (files in data_dir, or without it the originals on "
            "the Hub), a local file or folder of rows, or a data set of the Hub. None: commonsense if data_dir is "
            "given, else miniature.",
        },
    )
    data_dir: str | None = field(
        default=None,
        metadata={
            "decides": "result",
            "entry": "data",
            "compared": "alike",
            "help": "Folder of the commonsense rows: <data_dir>/<task>/{train,test}.json. None: from the Hub.",
        },
    )
    tasks: list[str] | None = field(
        default=None,
        metadata={
            "decides": "result",
            "entry": "data",
            "compared": "alike",
            "help": "Tasks to use, of rows that have an instruction and an answer. None: all there are.",
        },
    )
    train_rows_per_task: int | None = field(
        default=None,
        metadata={
            "decides": "result",
            "entry": "data",
            "compared": "alike",
            "help": "Train on at most so many rows of each task. None: all.",
        },
    )
    eval_rows_per_task: int | None = field(
        default=None,
        metadata={
            "decides": "server",
            "compared": "alike",
            "help": "Evaluate on at most so many rows of each task. None: all.",
        },
    )
    partition: str = field(
        default="task_dirichlet",
        metadata={
            "decides": "result",
            "entry": "data",
            "compared": "split",
            "help": "How rows are split among clients; column takes the clients of partition_column.",
            "choices": tuple(SCHEME_OPTIONS),
        },
    )
    num_clients: int | None = field(
        default=None,
        metadata={
            "decides": "result",
            "entry": "data",
            "compared": "split",
            "help": "Clients to split the rows among; column counts them itself.",
        },
    )
    partition_column: str | None = field(
        default=None,
        metadata={
            "decides": "result",
            "entry": "data",
            "compared": "split",
            "help": "Column of labels to split by (None: task); for column, the one that says whose a row is.",
        },
    )
    dirichlet_alpha: float | None = field(
        default=None,
        metadata={
            "decides": "result",
            "entry": "data",
            "compared": "split",
            "help": "Concentration of the Dirichlet schemes: the smaller, the less alike. None: 0.1.",
        },
    )
    shards_per_client: int | None = field(
        default=None,
        metadata={
            "decides": "result",
            "entry": "data",
            "compared": "split",
            "help": "Shards of each client under sorted_shards. None: 2.",
        },
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


@told_by_fields
@dataclass
class ModelArguments(ModelConfig):
    """TRL's `ModelConfig` for the one kind of adapter there is here: plain LoRA, so `use_peft` is on by default.

    Raises:
        SettingsError: a ValueError with one line for each setting that cannot work.
    """

    use_peft: bool = field(
        default=True,
        metadata={"decides": "result", "entry": None, "help": "Always true: clients train LoRA adapters."},
    )

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
