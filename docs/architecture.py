"""Draw docs/architecture.png, the package's rooms and what they import from each other: python docs/architecture.py

Everything is read from the sources: every import counts, also one within a function or under `if TYPE_CHECKING`.
"""

import ast
import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

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


def room_graph() -> dict[str, list[str]]:
    """Room -> the rooms it imports from, in order of names."""
    pairs = {(room(module), room(other)) for module, others in graph().items() for other in others}
    rooms = sorted({room(module) for module in modules()})
    return {here: [there for there in rooms if (here, there) in pairs and there != here] for here in rooms}


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


# ---- the picture ----

# Where a room stands from left to right, so that arrows pass between boxes, and what lies in it in a few words. How
# high it stands follows from its imports.
ROOMS = {
    "common": (0.5, "random draws, processes,\nsentences of settings"),
    "storage": (0.7, "checkpoints, ledger,\nfiles in one step"),
    "methods": (0.3, "one paper a file"),
    "models": (0.12, "client adapters in\none PEFT model"),
    "updates": (0.37, "what happens to\na client's change"),
    "data": (0.63, "rows, and whose\nthey are"),
    "reports": (0.88, "tables, pages, figures:\nno torch"),
    "rounds": (0.5, "who trains what,\nand the server's step"),
    "config": (0.5, "the fields, and\nwhat cannot work"),
    "evaluation": (0.17, "asking a model"),
    "hub": (0.83, "rounds on the Hub"),
    "trainers": (0.5, "a run as one train()"),
    "launch": (0.5, "from a recipe to an adapter"),
    "comparison": (0.3, "many runs"),
    "federation": (0.7, "many machines"),
}
OF_THE_ROOT = ("__init__", "moved")  # not drawn: names only
DARK, GREY, EDGE = "#22303c", "#5d6871", "#aab3ba"
COLOURS = (
    "#f3e1d8",
    "#e9ecd9",
    "#dcebe4",
    "#dce7f2",
    "#e7e0f0",
    "#f2e3ea",
    "#ece7dc",
    "#e3e6e8",
    "#eef0ea",
)  # of rows, upwards
WIDE, HIGH, BOX_WIDE, BOX_HIGH = 12.0, 1.28, 2.2, 0.8  # of the picture, of a row, of a box
NOTE = "The graph that the picture was drawn from"


def picture() -> dict[str, dict]:
    """All that the picture tells: rooms with their modules, and arrows, those left out that a longer way implies."""
    found = room_graph()
    drawn = [name for name in found if name not in OF_THE_ROOT]
    return {
        "modules": {name: sum(room(module) == name for module in modules()) for name in drawn},
        "arrows": {name: [other for other in found[name] if not _implied(found, name, other)] for name in drawn},
    }


def _implied(found: dict[str, list[str]], name: str, other: str) -> bool:
    """Whether another of the rooms that `name` imports from leads to `other`."""
    return any(other in _below(found, between) for between in found[name] if between != other)


def _below(found: dict[str, list[str]], name: str) -> set[str]:
    return set(found[name]).union(*(_below(found, other) for other in found[name]))


def _layers(arrows: dict[str, list[str]]) -> list[list[str]]:
    """Rooms by the longest way down, the lowest first."""

    def depth(name: str) -> int:
        return 1 + max((depth(other) for other in arrows[name]), default=-1)

    depths = {name: depth(name) for name in arrows}
    return [[name for name in arrows if depths[name] == level] for level in range(max(depths.values()) + 1)]


def _draw_room(axes: Axes, name: str, count: int, place: tuple[float, float], colour: str) -> None:
    x, y = place
    corner = (x - BOX_WIDE / 2, y - BOX_HIGH / 2)
    look = {"boxstyle": "round,pad=0,rounding_size=0.08", "facecolor": colour, "edgecolor": EDGE, "zorder": 2}
    axes.add_patch(FancyBboxPatch(corner, BOX_WIDE, BOX_HIGH, **look))
    title = f"{name}.py" if count == 1 else f"{name}/  {count}"
    words = ROOMS[name][1]
    y += 0.2 if "\n" in words else 0.12
    axes.text(x, y, title, ha="center", va="center", fontsize=12, fontweight="bold", color=DARK, zorder=3)
    axes.text(x, y - 0.13, words, ha="center", va="top", fontsize=9.5, color=GREY, linespacing=1.25, zorder=3)


def draw(path: Path) -> None:
    told = picture()
    layers = _layers(told["arrows"])
    places = {name: (WIDE * ROOMS[name][0], HIGH * (i + 0.5)) for i, layer in enumerate(layers) for name in layer}
    height = HIGH * len(layers) + 0.35
    figure = Figure(figsize=(WIDE, height), dpi=110, facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, WIDE), ylim=(-0.35, height - 0.35))
    axes.set_axis_off()
    for level, layer in enumerate(layers):
        for name in layer:
            _draw_room(axes, name, told["modules"][name], places[name], COLOURS[level % len(COLOURS)])
    for name, others in told["arrows"].items():
        for other in others:
            (x, y), (to_x, to_y) = places[name], places[other]
            look = {"arrowstyle": "-|>", "mutation_scale": 11, "linewidth": 1.1, "color": GREY, "zorder": 1}
            start, end = (x, y - BOX_HIGH / 2), (to_x, to_y + BOX_HIGH / 2)
            axes.add_patch(FancyArrowPatch(start, end, shrinkA=0, shrinkB=0, **look))
    words = "An arrow: imports from. Left out where a longer way says so already. Numbers: modules."
    axes.text(WIDE / 2, -0.18, words, ha="center", va="center", fontsize=10.5, color=GREY)
    note = {"Software": None, "Description": f"{NOTE}: {json.dumps(told)}"}
    figure.savefig(path, format="png", metadata=note)


if __name__ == "__main__":
    draw(Path(__file__).with_name("architecture.png"))
