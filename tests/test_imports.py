"""Imports go one way, sources stay short: what keeps the rooms of docs/architecture.md apart.

Every import counts, also one within a function or under `if TYPE_CHECKING`: a reader follows those, too.
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from docs.architecture import PACKAGE, ROWS, circles, graph, imports, modules, room

ROOT = PACKAGE.parent
LEVEL = {name: level for level, row in enumerate(ROWS) for name in row}
TORCH_ONLY = {"methods", "rounds", "updates", "common.draws"}
NOT_TORCH = ("transformers", "trl", "peft", "accelerate", "torch.distributed", "datasets")
SOURCES = sorted([*PACKAGE.rglob("*.py"), *(ROOT / "recipes").rglob("*.py")])
LONGEST_FILE, LONGEST_FUNCTION = 400, 60  # lines


def test_every_module_has_a_row():
    assert {room(module) for module in modules()} == LEVEL.keys()


@pytest.mark.parametrize("module", modules())
def test_imports_go_one_way(module):
    here = room(module)
    for other in sorted(graph()[module]):
        if room(other) != here:
            assert LEVEL[room(other)] < LEVEL[here], f"{module} imports {other}"


def test_nothing_imports_itself_by_way_of_others():
    assert circles() == []


def test_kinds_of_trainer_lie_over_what_they_have_in_common():
    """What imports the mixin is a kind of trainer, and nothing beside them imports a kind, the mixin's parts least."""
    inside = {module: others for module, others in graph().items() if room(module) == "trainers"}
    kinds = {module for module, others in inside.items() if "trainers.federated" in others}
    assert "trainers.sft" in kinds
    for module, others in inside.items():
        assert not others & kinds, f"{module} imports {sorted(others & kinds)}"


@pytest.mark.parametrize("module", [module for module in modules() if {room(module), module} & TORCH_ONLY])
def test_methods_updates_and_rounds_know_tensors_only(module):
    found = [name for name in imports(module) if name.startswith(NOT_TORCH)]
    assert not found, f"{module} imports {found}"


def test_the_package_s_root_holds_few_modules():
    assert len(list(PACKAGE.glob("*.py"))) <= 4


def long_parts(path: Path, root: Path = ROOT) -> list[str]:
    """The file, if it is too long, and every function that is."""
    name, text = path.relative_to(root).as_posix(), path.read_text(encoding="utf-8")
    long = [name] if text.count("\n") > LONGEST_FILE else []
    for node in ast.walk(ast.parse(text)):
        is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        if is_function and node.end_lineno - node.lineno + 1 > LONGEST_FUNCTION:
            long.append(f"{name}: {node.name}")
    return long


def test_sources_are_short():
    assert [part for path in SOURCES for part in long_parts(path)] == []


def test_what_is_read_of_a_source(tmp_path, monkeypatch):
    """Imports of all kinds count, and a circle through two others is found: else the tests above could not fail."""
    from docs import architecture

    package = tmp_path / "fslora_hf"
    (package / "low").mkdir(parents=True)
    (package / "low" / "__init__.py").write_text("")
    (package / "low" / "a.py").write_text("def f():\n    from ..high import b\n    import trl.core\n")
    (package / "high").mkdir()
    (package / "high" / "__init__.py").write_text("value = 1\n")
    (package / "high" / "b.py").write_text("from fslora_hf.high.c import x\nfrom . import value\n")
    typing = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from ..low.a import f\nfrom .. import high\n"
    (package / "high" / "c.py").write_text(typing)
    (package / "__init__.py").write_text("from .low import a\n")
    monkeypatch.setattr(architecture, "PACKAGE", package)
    for cached in (architecture.modules, architecture.graph):
        cached.cache_clear()
    try:
        assert graph() == {
            "__init__": {"low.a"},
            "low.__init__": set(),
            "low.a": {"high.b"},
            "high.__init__": set(),
            "high.b": {"high.c", "high.__init__"},
            "high.c": {"low.a", "high.__init__"},
        }
        assert circles() == [["high.b", "high.c", "low.a"]]
        assert list(imports("low.a")) == [".high.b", "trl.core"]
    finally:
        monkeypatch.undo()
        for cached in (architecture.modules, architecture.graph):
            cached.cache_clear()


def test_what_is_long(tmp_path):
    path = tmp_path / "long.py"
    path.write_text("def f():\n" + "    pass\n" * 59 + "x = 1\n" * 340)
    assert long_parts(path, tmp_path) == []
    path.write_text("class A:\n    def f(self):\n" + "        pass\n" * 60 + "x = 1\n" * 339)
    assert long_parts(path, tmp_path) == ["long.py", "long.py: f"]


def test_what_pushes_or_ranks_starts_without_torch():
    """It is torch and what brings it along that makes a start take seconds."""
    slow = {"torch", "transformers", "peft", "trl"}
    scripts = ["recipes.push", "recipes.push_results", "recipes.leaderboard", "fslora_hf.federation.client_app"]
    code = f"import sys, {', '.join(scripts)}; print(sorted({slow} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_what_stores_shows_and_pushes_needs_no_torch():
    """But for what reads tensors, and what takes a snapshot within training."""
    needing = {"fslora_hf.storage.tensor_file", "fslora_hf.hub.publisher"}
    named = {f"fslora_hf.{module}" for module in modules() if room(module) in ("storage", "reports", "hub")}
    assert needing < named
    wanted = sorted(name for name in named - needing if not name.endswith("__init__"))
    code = f"import sys, {', '.join(wanted)}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
