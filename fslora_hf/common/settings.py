"""Errors in settings: each a sentence, all of them reported together; and the checks that any dataclass can have."""

import difflib
import enum
import numbers
import os
import reprlib
import types
import typing
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import MISSING, Field, fields
from itertools import islice
from typing import Any

from .foreign_text import foreign_text
from .masking import is_secret_name, mask, scrub, scrub_quoted

# A list of a million ranks must not fill the screen.
_brief = reprlib.Repr()
_brief.maxlist, _brief.maxdict, _brief.maxstring, _brief.maxother, _brief.maxlevel = 8, 8, 200, 200, 3
_LONGEST = 600  # characters of a value that a sentence shows
_KINDS = {int: "an integer", float: "a number", bool: "true or false", str: "a text"}
_SEVERAL = {int: "integers", float: "numbers", bool: "true or false", str: "texts"}


class SettingsError(ValueError):
    """All that is wrong with some settings: one sentence each in `problems`, one line each in the message."""

    def __init__(self, problems: list[str]):
        self.problems = problems = [scrub(problem) for problem in problems]
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        super().__init__("\n- ".join([f"Expected settings that work, found {count}:", *problems]))


def sentence(name: str, expected: str, found: Any, remedy: str) -> str:
    """The form of every settings error: what was expected, what was found and how to mend it."""
    return f"Expected {scrub(name)} to be {expected}, found {shown(name, found)}: {remedy}."


def shown(name: str, value: Any) -> str:
    """A value as a sentence shows it: in brief, and of what may be a secret by its name only which kind it is."""
    value = getattr(value, "value", value)  # an enumeration's
    if is_secret_name(str(name).split(" ")[0]):  # "hub_token on the command line"
        return kind_of(value)
    if isinstance(value, (list, tuple, Mapping)):
        few = islice(value.items(), 9) if isinstance(value, Mapping) else islice(value, 9)  # one more than is shown
        value = mask(dict(few) if isinstance(value, Mapping) else type(value)(few) if type(value) is tuple else [*few])
    try:
        text = _brief.repr(value)
    except ValueError:  # an integer of more digits than Python writes out
        text = "a number of thousands of digits"
    text = scrub_quoted(text)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def said(error: BaseException) -> str:
    """What another library's error says, on one line and without secrets; its type if it says nothing."""
    text = foreign_text(scrub_quoted(str(error)[:2000]), _LONGEST)
    return text if " " in text else f"{type(error).__name__} {text}".rstrip()


def named(name: Any) -> str:
    """A key of a file, in brief; one that is no word as YAML reads it may be a misplaced value."""
    return scrub(foreign_text(name, 60)) if isinstance(name, (str, int, float)) or name is None else kind_of(name)


def kind_of(value: Any) -> str:
    """What kind of value it is, in words that tell nothing of it."""
    if value is None:
        return "nothing"
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, (list, tuple, set, frozenset)):
        return "a list"
    for kind in (bool, float, str):
        if is_a(value, kind):
            return {bool: "true or false", float: "a number", str: "a text"}[kind]
    return f"a {type(value).__name__}"


def did_you_mean(word: Any, known: Iterable[str]) -> str:
    """The remedy for a word that is not one of the known ones."""
    near = difflib.get_close_matches(str(word), list(known), n=1)
    return f"did you mean {near[0]}" if near else "choose one of these"


def default_of(each: Field) -> Any:
    """The default of a dataclass field that has one."""
    return each.default if each.default_factory is MISSING else each.default_factory()


def field_problems(settings: Any, besides: Collection[str] = ()) -> dict[str, str]:
    """Values of a dataclass that miss the type or the `choices` of their field: field name -> sentence.

    A dataclass checks neither, and values from a YAML file do not pass through argparse's choices. Looks at fields of
    type int, float, bool, str, lists of these, mappings and enumerations, or a union of such and None, and at those
    with `choices`, save those in `besides`.
    """
    problems, hints = {}, typing.get_type_hints(type(settings))
    for each in (each for each in fields(settings) if each.name not in besides):
        value, choices = getattr(settings, each.name), list(each.metadata.get("choices", ()))
        kinds = _known_kinds(hints[each.name])
        if kinds and not any(_fits(value, kind) for kind in kinds):
            expected = " or ".join(dict.fromkeys(_expectations(kinds)))
            remedy = f"write {expected}" + (" without quotes" if isinstance(value, str) else "")
            if isinstance(value, str) and any(typing.get_origin(kind) is list for kind in kinds):
                remedy = "put it in brackets, with commas between several"
            problems[each.name] = sentence(each.name, expected, value, remedy)
        elif choices and value is not None and value not in choices:
            expected = f"one of {', '.join(choices)}"
            problems[each.name] = sentence(each.name, expected, value, did_you_mean(value, choices))
    return problems


def is_a(value: Any, kind: type) -> bool:
    """isinstance, but True is no number, an integer is a float, and a path is a text."""
    if kind in (int, float):
        number = numbers.Integral if kind is int else numbers.Real
        return isinstance(value, number) and not isinstance(value, bool)
    return isinstance(value, (str, os.PathLike) if kind is str else kind)


def written(settings: Any) -> dict[str, Any]:
    """All settings of a dataclass of transformers as they may be written into a file: without secrets."""
    values = settings.to_dict()  # which has no tokens, not even those that are words of a vocabulary
    words = {name for name in values if name.endswith("_token") and not is_secret_name(name)}
    return mask(values | {name: getattr(settings, name) for name in words})


def _known_kinds(hint: Any) -> tuple[Any, ...]:
    """The members of a type hint if all are known here (`int | None` -> int, NoneType), else nothing."""
    is_union = typing.get_origin(hint) in (types.UnionType, typing.Union)
    kinds = typing.get_args(hint) if is_union else (hint,)
    return kinds if all(_is_known(kind) for kind in kinds) else ()


def _is_known(kind: Any) -> bool:
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is list:
        return all(each in _KINDS or _is_enumeration(each) for each in inner)
    if kind in _KINDS or kind in (types.NoneType, dict) or origin is dict:
        return True
    return _is_enumeration(kind) or (origin is typing.Literal and inner == (False,))


def _is_enumeration(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, enum.Enum)


def _fits(value: Any, kind: Any) -> bool:
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is list:
        return isinstance(value, (list, tuple)) and all(any(_fits(each, one) for one in inner) for each in value)
    if origin is typing.Literal:
        return value is False
    return is_a(value, dict if origin is dict else kind)


def _expectations(kinds: Iterable[Any]) -> Iterator[str]:
    """What the values of these kinds are called."""
    for kind in kinds:
        origin, inner = typing.get_origin(kind), typing.get_args(kind)
        if origin is list:
            yield f"a list of {_SEVERAL.get(inner[0], 'texts')}"
        elif kind is dict or origin is dict:
            yield "a mapping"
        elif origin is typing.Literal:
            yield "false"
        elif kind is not types.NoneType:
            yield _KINDS.get(kind, "a text")


def is_whole(value: object) -> bool:
    """Whether `value` is an integer, Python's or numpy's; a truth value is none."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)
