"""YAML files that people write, read strictly: what is wrong is told by its place, and no line is repeated.

A recipe may hold a token, and what YAML's own errors say quotes names and values of the file.
"""

import os
import re
from typing import Any

import yaml

DEEPEST = 32  # levels
MOST = 2_000_000  # values, those that aliases repeat counted each time
_QUOTED = re.compile(r"'[^'\n]{3,}'|\"[^\"\n]{3,}\"")


class YamlFileError(ValueError):
    """What keeps a file from being read, as the end of `found ...`."""


def read_yaml(path: str | os.PathLike) -> tuple[Any, list[str]]:
    """What a file of one YAML document holds, and the keys that it gives more than once in one mapping.

    Raises:
        YamlFileError: it cannot be read, is no YAML, or nests or repeats its values beyond all use.
    """
    try:
        with open(path, encoding="utf-8-sig") as file:
            loader = _StrictLoader(file)
            return loader.get_single_data(), loader.twice
    except OSError as error:
        raise YamlFileError(error.strerror or type(error).__name__) from None
    except UnicodeDecodeError as error:
        raise YamlFileError(f"a byte that is no UTF-8 at place {error.start}") from None
    except yaml.reader.ReaderError as error:
        raise YamlFileError(f"a character that no text has (#x{error.character:04x})") from None
    except yaml.MarkedYAMLError as error:
        raise YamlFileError(_told(error)) from None
    except (ValueError, yaml.YAMLError) as error:  # a path with a NUL
        raise YamlFileError(_QUOTED.sub("'...'", " ".join(str(error).split()))) from None


def _told(error: yaml.MarkedYAMLError) -> str:
    """YAML's complaint with its place; texts of the file are left out."""
    text = " ".join(filter(None, (error.context, error.problem)))
    mark = error.problem_mark or error.context_mark
    place = f" in line {mark.line + 1}, column {mark.column + 1}" if mark else ""
    return _QUOTED.sub("'...'", " ".join(text.split())).removeprefix("found ") + place


class _StrictLoader(yaml.SafeLoader):
    """YAML that remembers in `twice` which keys are given more than once; the last value would count silently."""

    def __init__(self, stream: Any):
        super().__init__(stream)
        self.twice: list[str] = []
        self._level = 0
        self._sizes: dict[int, tuple[int, int]] = {}  # node -> its values and its levels

    def compose_node(self, parent: Any, index: Any) -> yaml.Node:
        mark, is_alias = self.peek_event().start_mark, self.check_event(yaml.AliasEvent)
        self._level += 1
        self._check(self._level <= DEEPEST, f"more than {DEEPEST} levels", mark)
        node = super().compose_node(parent, index)
        self._level -= 1
        if is_alias:  # of a node around it, if that is not complete yet
            self._check(id(node) in self._sizes, "a value that holds itself", mark)
        elif node.id == "scalar":
            self._sizes[id(node)] = 1, 1
        else:
            inner = [each for pair in node.value for each in pair] if node.id == "mapping" else node.value
            sizes, levels = zip(*(self._sizes[id(each)] for each in inner), strict=True) if inner else ((), ())
            self._sizes[id(node)] = size, depth = 1 + sum(sizes), 1 + max(levels, default=0)
            self._check(size <= MOST, f"more than {MOST:,} values", mark)
            self._check(depth <= DEEPEST, f"more than {DEEPEST} levels", mark)
        return node

    def construct_mapping(self, node: yaml.Node, deep: bool = False) -> dict:
        if isinstance(node, yaml.MappingNode):
            keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            self.twice += sorted({key for key in keys if keys.count(key) > 1}) if len(keys) > len({*keys}) else []
        return super().construct_mapping(node, deep)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError):  # of a date, or after a tag
            self._check(False, "a value that is not what its form or its tag says", node.start_mark)

    @staticmethod
    def _check(holds: bool, found: str, mark: yaml.Mark) -> None:
        if not holds:
            raise yaml.constructor.ConstructorError(None, None, found, mark)
