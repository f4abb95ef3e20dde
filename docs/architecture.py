"""Draw docs/architecture.png, the package's rooms and what they import from each other: python docs/architecture.py

Everything is read from the sources: every import counts, also one within a function or under `if TYPE_CHECKING`.
"""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "fslora_hf"
# Rooms, and modules of the package's root, from the lowest row up: each may import from lower rows only.
ROWS = (
    ("common",),
    ("storage",),
    ("data", "methods"),
    ("updates",),
    ("rounds",),
    ("models",),
    ("reports",),
    ("config",),
    ("evaluation", "hub"),
    ("trainers",),
    ("launch",),
    ("comparison", "federation"),
    ("moved",),
    ("__init__",),
)
# Within trainers: what no other row names lies below both.
KINDS_OF_TRAINER = ("federated", "sft")


@cache
def modules() -> tuple[str, ...]:
    """Every module, `rounds.plan`; of a package, `rounds.__init__`."""
    paths = (path.relative_to(PACKAGE).with_suffix("") for path in PACKAGE.rglob("*.py"))
    return tuple(sorted(".".join(path.parts) for path in paths))


def path_of(module: str) -> Path:
    """The source of a module."""
    return PACKAGE.joinpath(*module.split(".")).with_suffix(".py")


def room(module: str) -> str:
    """The room a module lies in; a module of the package's root is a room of its own."""
    return module.split(".")[0]


def imports(module: str) -> Iterator[str]:
    """Every name that a module imports: modules of this package as `modules` has them after a dot, `.rounds.plan`."""
    for node in ast.walk(ast.parse(path_of(module).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield from _found(alias.name.split("."), [])
        elif isinstance(node, ast.ImportFrom):
            here = [PACKAGE.name, *module.split(".")[:-1]]
            base = here[: len(here) - node.level + 1] if node.level else []
            base += (node.module or "").split(".") if node.module else []
            yield from _found(base, [alias.name for alias in node.names])


def _found(base: list[str], names: list[str]) -> Iterator[str]:
    """What `from base import names` imports: a package's module for each name that is one, else the package."""
    if base[0] != PACKAGE.name:
        yield ".".join(base)
        return
    inside = base[1:]
    whole = _module(inside)
    if whole is not None and not whole.endswith("__init__"):
        yield f".{whole}"
        return
    if whole is None:
        raise ValueError(f"Expected a module, found no {'.'.join(base)}: name modules as they are called now.")
    for name in names or [""]:
        yield f".{_module([*inside, name]) or whole}"


def _module(parts: list[str]) -> str | None:
    """The module, or the package's `__init__`, at a place in the package; None if nothing is there."""
    names = (".".join(parts), ".".join([*parts, "__init__"]))
    return next((name for name in names if name in modules()), None)


@cache
def graph() -> dict[str, frozenset[str]]:
    """Module -> the modules of this package that it imports."""
    return {
        module: frozenset(name[1:] for name in imports(module) if name.startswith(".")) - {module}
        for module in modules()
    }


def room_graph() -> dict[str, dict[str, int]]:
    """Room -> room that it imports from -> in how many imports of module from module."""
    found: dict[str, dict[str, int]] = {}
    for module, imported in graph().items():
        arrows = found.setdefault(room(module), {})
        for other in imported:
            if room(other) != room(module):
                arrows[room(other)] = arrows.get(room(other), 0) + 1
    return found


def circles() -> list[list[str]]:
    """Modules that import each other in a circle, directly or by others; one list for each circle."""
    reach = {module: _reached(module) for module in modules()}
    found = {
        tuple(sorted({module, *(other for other in reach[module] if module in reach[other])})) for module in reach
    }
    return sorted(list(circle) for circle in found if len(circle) > 1)


def _reached(module: str) -> set[str]:
    seen: set[str] = set()
    waiting = [module]
    while waiting:
        for other in graph()[waiting.pop()] - seen:
            seen.add(other)
            waiting.append(other)
    return seen
