"""docs/architecture.md and its picture say what the code says."""

import ast
import json
import re
import struct
from pathlib import Path

import pytest

from docs.architecture import NOTE, OF_THE_ROOT, PACKAGE, draw, modules, picture, room

DOCS = PACKAGE.parent / "docs"
PAGE = (DOCS / "architecture.md").read_text(encoding="utf-8")
NAMED = re.findall(r"`([a-z_/]+\.py)(?:: ([\w.]+))?`", PAGE)


def told_by(picture: Path) -> dict:
    """The graph that a PNG was drawn from, which it carries as text."""
    content, place = picture.read_bytes(), 8
    while place < len(content):
        size, kind = struct.unpack(">I4s", content[place : place + 8])
        keyword, _, text = content[place + 8 : place + 8 + size].partition(b"\0")
        if kind == b"tEXt" and keyword == b"Description":
            return json.loads(text.decode("latin-1").removeprefix(f"{NOTE}: "))
        place += size + 12
    raise AssertionError(f"no graph in {picture}")


def test_the_picture_is_of_these_imports():
    assert told_by(DOCS / "architecture.png") == picture(), "run python docs/architecture.py"


def test_a_picture_tells_what_it_was_drawn_from(tmp_path, monkeypatch):
    """And the same graph gives the same bytes."""
    for name in ("one", "two"):
        draw(tmp_path / name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    changed = {**picture(), "modules": {**picture()["modules"], "common": 99}}
    monkeypatch.setattr("docs.architecture.picture", lambda: changed)
    draw(tmp_path / "other")
    assert told_by(tmp_path / "other") == changed != told_by(tmp_path / "one")


def test_the_picture_leaves_out_only_arrows_that_others_imply():
    arrows = picture()["arrows"]

    def below(name: str) -> set[str]:
        return set(arrows[name]).union(*map(below, arrows[name]))

    from docs.architecture import room_graph

    for name, others in room_graph().items():
        if name not in OF_THE_ROOT:
            assert below(name) >= set(others)
            assert not any(other in below(between) for other in arrows[name] for between in arrows[name])


def test_the_page_tells_of_every_room():
    rows = re.findall(r"^\| `(\w+)(?:/|\.py)` \| ", PAGE, re.MULTILINE)
    assert sorted(rows) == sorted({room(module) for module in modules()} - set(OF_THE_ROOT))


@pytest.mark.parametrize("path, symbol", sorted(set(NAMED)))
def test_the_page_names_what_is_there(path, symbol):
    body = ast.parse((PACKAGE / path).read_text(encoding="utf-8")).body
    for part in symbol.split(".") if symbol else ():
        names = {name: node for node in body for name in defined(node)}
        assert part in names, f"{symbol} in {path}"
        body = getattr(names[part], "body", [])


def defined(node: ast.stmt) -> list[str]:
    """The names that a statement of a module or class defines."""
    if isinstance(node, ast.Assign | ast.AnnAssign):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        return [target.id for target in targets if isinstance(target, ast.Name)]
    return [node.name] if isinstance(node, ast.ClassDef | ast.FunctionDef) else []


def test_the_page_names_enough():
    """The twelve changes, and four ways of several steps each."""
    assert len(NAMED) > 40 and all(symbol or path for path, symbol in NAMED)
    changes = PAGE.split("## Twelve changes")[1]
    assert len(re.findall(r"^\| (?!to change|---)", changes, re.MULTILINE)) == 12
