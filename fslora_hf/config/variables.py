"""Environment variables that a recipe sets: what cannot be one, told without their values, which may be secrets."""

import os
import re
from collections.abc import Iterator
from typing import Any

from ..common.settings import kind_of, named


def variable_problems(environment: Any) -> Iterator[str]:
    """What keeps a file's `env` from being set, in words that repeat no value of it."""
    if environment is None:
        return
    if not isinstance(environment, dict):
        remedy = "indent NAME: value below env:"
        yield f"Expected env to be a mapping of variables to values, found {kind_of(environment)}: {remedy}."
        return
    for name, value in environment.items():
        if not isinstance(name, str) or not re.fullmatch("[A-Za-z_][A-Za-z0-9_]*", name):
            remedy = "write each as NAME: value"
            yield f"Expected the names under env to be of letters, digits and _, found {named(name)}: {remedy}."
        elif not isinstance(value, (str, int, float)) or not _can_be_set(str(value)):
            found = "one that no variable can hold" if isinstance(value, str) else kind_of(value)
            yield f"Expected {named(name)} under env to have a text as its value, found {found}: put it in quotes."


def _can_be_set(text: str) -> bool:
    try:
        return b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:  # half a character
        return False
