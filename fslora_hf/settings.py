"""Errors in settings: each a sentence, all of them reported together; and the checks that any dataclass can have."""

import difflib
import numbers
import os
import reprlib
import types
import typing
from collections.abc import Collection, Iterable
from dataclasses import MISSING, Field, fields
from typing import Any

# A list of a million ranks must not fill the screen.
_brief = reprlib.Repr()
_brief.maxlist, _brief.maxdict, _brief.maxstring, _brief.maxother = 8, 8, 200, 200
_KINDS = {int: "an integer", float: "a number", bool: "true or false", str: "a text"}


class SettingsError(ValueError):
    """All that is wrong with some settings: one sentence each in `problems`, one line each in the message."""

    def __init__(self, problems: list[str]):
        self.problems = problems
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        super().__init__("\n- ".join([f"Expected settings that work, found {count}:", *problems]))


def sentence(name: str, expected: str, found: Any, remedy: str) -> str:
    """The form of every settings error: what was expected, what was found and how to mend it."""
    return f"Expected {name} to be {expected}, found {_brief.repr(getattr(found, 'value', found))}: {remedy}."


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
    type int, float, bool, str or a union of these and None, and at those with `choices`, save those in `besides`.
    """
    problems, hints = {}, typing.get_type_hints(type(settings))
    for each in (each for each in fields(settings) if each.name not in besides):
        value, choices = getattr(settings, each.name), list(each.metadata.get("choices", ()))
        kinds = _plain_kinds(hints[each.name])
        if kinds and not any(is_a(value, kind) for kind in kinds):
            expected = " or ".join(_KINDS[kind] for kind in kinds if kind in _KINDS)
            remedy = f"write {expected}" + (" without quotes" if isinstance(value, str) else "")
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


def _plain_kinds(hint: Any) -> tuple[type, ...]:
    """The members of a type hint if all are plain (`int | None` -> int, NoneType), else nothing."""
    is_union = typing.get_origin(hint) in (types.UnionType, typing.Union)
    kinds = typing.get_args(hint) if is_union else (hint,)
    return kinds if all(kind in _KINDS or kind is types.NoneType for kind in kinds) else ()


def mask_tokens(values: Any, name: str = "") -> Any:
    """Settings as they may be written down: texts whose name ends in `token`, at any depth, are masked."""
    if isinstance(values, dict):
        return {key: mask_tokens(value, str(key)) for key, value in values.items()}
    if isinstance(values, (list, tuple)):
        return [mask_tokens(value) for value in values]
    is_secret = isinstance(values, str) and name.lower().endswith("token") and not values.startswith("<")
    return f"<{name.upper()}>" if is_secret else values
