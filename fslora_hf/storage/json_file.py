"""JSON that somebody else may have written, or a failing disk: a value, or one reason why there is none."""

import json
from pathlib import Path
from typing import Any

from ..common.foreign_text import foreign_text

LARGEST = 200 * 2**20  # bytes that are read at most


class DamagedFile(ValueError):
    """Why a file is not what it should be, a phrase for within a sentence."""


def read_json(path: str | Path) -> Any:
    """The value in a JSON file.

    Raises:
        DamagedFile: it cannot be read, or holds no JSON.
    """
    try:
        if Path(path).stat().st_size > LARGEST:
            raise DamagedFile(f"more than {LARGEST // 2**20} MiB")
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except RecursionError:
        raise DamagedFile("values nested too deep") from None
    except (OSError, ValueError, MemoryError) as error:
        raise DamagedFile(foreign_text(getattr(error, "strerror", None) or error)) from None


def read_object(path: str | Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        DamagedFile: it cannot be read, or holds anything else.
    """
    value = read_json(path)
    if not isinstance(value, dict):
        raise DamagedFile(f"{kind_of(value)} in place of an object")
    return value


def kind_of(value: Any) -> str:
    """What a JSON value is, for a sentence."""
    kinds = {bool: "true or false", type(None): "null", list: "a list", dict: "an object", str: "a text"}
    return kinds.get(type(value), "a number")


def is_whole(value: Any, least: int = 0) -> bool:
    """Whether a JSON value is an integer (true is none) of some 18 digits at most, not below `least`."""
    return type(value) is int and least <= value < 2**63
