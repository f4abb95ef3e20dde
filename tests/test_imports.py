"""Imports go one way: each module of the package may use those of lower rows only (fslora_hf's architecture)."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "fslora_hf"
ROWS = [
    {"common"},
    {"storage"},
    {"data", "methods"},
    {"updates"},
    {"rounds"},
    {"models"},
    {"reports"},
    {"config"},
    {"evaluation", "hub"},
    {"trainers"},
    {"launch"},
    {"comparison", "federation"},
    {"moved"},
    {"__init__"},
]
LEVEL = {name: level for level, row in enumerate(ROWS) for name in row}
TORCH_ONLY = {"methods", "rounds", "updates"}


def modules():
    return sorted(PACKAGE.rglob("*.py"))


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def runtime_imports(path: Path):
    """(room of this package or None, absolute module name) of every import outside `if TYPE_CHECKING`."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typing_only = {
        id(node)
        for branch in ast.walk(tree)
        if isinstance(branch, ast.If) and getattr(branch.test, "id", "") == "TYPE_CHECKING"
        for node in ast.walk(branch)
    }
    parents = path.relative_to(PACKAGE).parts[:-1]
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            yield from ((None, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level == 0:
                yield None, node.module
                continue
            base = [*parents[: len(parents) - node.level + 1], *(node.module or "").split(".")]
            names = [part for part in base if part] or [alias.name for alias in node.names]
            for name in names[:1] if node.module or parents else names:
                yield name, ""


@pytest.mark.parametrize("path", modules(), ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_imports_go_one_way(path):
    here = room(path)
    assert here in LEVEL, f"{here} has no row: give it one"
    for imported, _ in runtime_imports(path):
        if imported is not None and imported != here:
            assert LEVEL[imported] < LEVEL[here], f"{here} imports {imported}"


@pytest.mark.parametrize("path", [p for p in modules() if room(p) in TORCH_ONLY], ids=lambda path: path.name)
def test_methods_and_sketches_know_tensors_only(path):
    for _, module in runtime_imports(path):
        for forbidden in ("transformers", "trl", "peft", "accelerate", "torch.distributed", "datasets"):
            assert not module.startswith(forbidden), f"{path.name} imports {module}"


def test_what_pushes_or_ranks_starts_without_torch():
    """It is torch and what brings it along that makes a start take seconds."""
    slow = {"torch", "transformers", "peft", "trl"}
    scripts = ["recipes.push", "recipes.push_results", "recipes.leaderboard", "fslora_hf.federation.client_app"]
    code = f"import sys, {', '.join(scripts)}; print(sorted({slow} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
