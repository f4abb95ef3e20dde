"""Text that comes from others: nodes, servers, repositories, files of results.

A name, a reason or an error's text that somebody else chose may hold line feeds that forge lines of a log, escapes
that drive a terminal, marks that turn the direction of reading, or a hundred million characters. Whatever of it stands
in a log, a ledger, a notice, a page or an error passes through here first.
"""

import heapq
import os
import re
import reprlib
from collections.abc import Collection, Mapping, Set
from itertools import islice
from typing import Any

LONGEST = 200  # characters of one text
LONGEST_NAME = 60  # of one of many names
LONGEST_TASK = 100  # of the name of a task, which heads a column
LONGEST_REASON = 400  # of why something could not be done, in the words of others
LONGEST_MESSAGE = 1000  # of a message that quotes several
MOST_NAMED = 5  # of many names in a sentence
MOST_FIELDS = 40  # of an object that others have written

_ESCAPE = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)?|\x1b[@-Z\\^_]?")
_brief = reprlib.Repr()
_brief.maxlist = _brief.maxtuple = _brief.maxdict = _brief.maxset = 4
_brief.maxstring, _brief.maxother, _brief.maxlevel = LONGEST, LONGEST, 3


def foreign_text(text: Any, longest: int = LONGEST) -> str:
    """One line of printable characters, at most `longest` of them, the last an ellipsis where it was cut.

    Args:
        text: a text, an error or a path, by what they say; any other value as Python writes it, in brief. It takes no
            longer for a text of any length.
    """
    text = str(text) if isinstance(text, str | BaseException | os.PathLike) else _brief.repr(text)
    head = _ESCAPE.sub("", text[: 4 * longest])
    line = " ".join("".join(c if c.isprintable() else " " for c in head).split())
    if len(line) <= longest and len(text) <= 4 * longest:
        return line
    return line[: longest - 1].rstrip() + "…"


def foreign_value(value: Any, longest: int = LONGEST) -> str:
    """A value as Python writes it, texts in quotes, in brief and on one line."""
    return foreign_text(_brief.repr(value), longest)


def foreign_fields(values: Mapping[str, Any], most: int = MOST_FIELDS) -> dict[str, Any]:
    """The first few values by their names, made short: numbers, truth values and None as they are, others as texts."""
    return {foreign_text(name, LONGEST_NAME): _short(value) for name, value in islice(values.items(), most)}


def _short(value: Any) -> Any:
    if isinstance(value, str):
        return foreign_text(value)
    is_plain = value is None or isinstance(value, bool | float) or isinstance(value, int) and abs(value) < 2**63
    return value if is_plain else foreign_value(value)


def foreign_names(
    names: Collection[Any], most: int = MOST_NAMED, longest: int = LONGEST_NAME, between: str = ", "
) -> str:
    """The first few of some names, and how many more there are, or "none"; of a set, the least ones."""
    first = heapq.nsmallest(most, names, key=str) if isinstance(names, Set) else list(islice(names, most))
    told = between.join(foreign_text(name, longest) for name in first)
    return (told or "none") if len(names) <= most else f"{told} and {len(names) - most:,} more"
