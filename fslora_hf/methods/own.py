"""A method in a user's own file: from the text `module:Class` to the class, or a sentence that says what is wrong."""

import importlib
import inspect
import os
import re
import sys
import traceback
from types import ModuleType
from typing import Any

from ..common.settings import did_you_mean
from .base import Method
from .contract import MethodError

_PATH = re.compile(r"(?P<module>[^\W\d]\w*(\.[^\W\d]\w*)*):(?P<name>[^\W\d]\w*)")


def load_class(path: str) -> type[Method]:
    """The subclass of `Method` that `path`, a text `module:Class`, names.

    As with `python -m`, the folder that the run is started from can be imported from.

    Raises:
        MethodError: no such module or class, an error of the user's own file, or a class that is no method.
    """
    match = _PATH.fullmatch(path)
    if match is None:
        remedy = "name a module as an import does and a class in it, as in my_methods:MyMethod"
        raise MethodError(f"Expected method to be of the form module:Class, found {path!r}: {remedy}.")
    module, name = _import(match["module"], path), match["name"]
    if not hasattr(module, name):
        raise _no_such_class(module, name)
    problem = _problem_of_class(path, getattr(module, name))
    if problem is not None:
        raise MethodError(problem)
    return getattr(module, name)


def _import(name: str, path: str) -> ModuleType:
    folder = os.getcwd()
    if folder not in sys.path:
        sys.path.insert(0, folder)
    importlib.invalidate_caches()  # a notebook may have written the file a moment ago
    try:
        return importlib.import_module(name)
    except Exception as error:
        # An import inside the user's file that fails is that file's error; its own name missing is another.
        if isinstance(error, ModuleNotFoundError) and f"{name}.".startswith(f"{error.name}."):
            found = f"no module {error.name} in {folder} or on Python's path"
            remedy = "start the run in the folder that holds it, or correct the name"
            if name.endswith(".py"):
                remedy = f"write {path.replace('.py:', ':')}"
        else:
            found, remedy = _told(error), "mend that file"
        expected = f"method={path} to name a module that can be imported"
        raise MethodError(f"Expected {expected}, found {found}: {remedy}.") from error


def _told(error: Exception) -> str:
    """An error of an imported file: its kind, its own message, and the line it was raised at."""
    text = f"{type(error).__name__}: {' '.join(str(error).split())}"
    if isinstance(error, SyntaxError):  # its message says where
        return text
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{text} ({os.path.basename(last.filename)}, line {last.lineno})"


def _no_such_class(module: ModuleType, name: str) -> MethodError:
    own = [
        known
        for known, value in vars(module).items()
        if isinstance(value, type) and issubclass(value, Method) and value.__module__ == module.__name__
    ]
    where = f"{module.__name__} ({getattr(module, '__file__', None) or 'a module without a file'})"
    remedy = did_you_mean(name, own) if own else f"write class {name}(Method) there"
    return MethodError(f"Expected a class {name} in {where}, found {', '.join(own) or 'no method'}: {remedy}.")


def _problem_of_class(path: str, found: Any) -> str | None:
    """What keeps `found` from being a method, as a sentence."""
    base = f"{Method.__module__.rpartition('.')[0]}.{Method.__name__}"
    if not isinstance(found, type) or not issubclass(found, Method):
        kind = f"a class of {found.__mro__[1].__name__}" if isinstance(found, type) else f"a {type(found).__name__}"
        return f"Expected {path} to be a subclass of {base}, found {kind}: derive it from Method."
    missing = [name for name in ("receive", "accumulate") if getattr(found, name) is getattr(Method, name)]
    if missing:
        return f"Expected {path} to write receive and accumulate, found no {' and no '.join(missing)}: define it."
    trains = found.trains
    if not isinstance(trains, (tuple, list)) or not trains or not set(trains) <= {"A", "B"}:
        return f"Expected {path}.trains to hold 'A', 'B' or both, found {trains!r}: write it as in trains = ('B',)."
    try:
        inspect.signature(found).bind()
    except TypeError as error:
        return f"Expected {path} to be made without arguments, found {error}: give its arguments defaults."
    return None
