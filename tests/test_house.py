"""The rules that keep the package a house: who may import whom, and where things are."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "lightning_trak"
# In the order of the data: each room may import those before it. The files beside the rooms are there for all.
ROOMS = [
    *("isolation", "data", "tasks", "gradients", "projection", "curvature", "features", "store"),
    *("influence", "results", "trainer", "evaluation", "commands"),
]
OF_TRAINER = ["host", "featurizing", "fit", "arguments", "callback", "attributing"]  # then what a user calls
FOR_ALL = {"metrics", "precision"}
FILES = sorted(PACKAGE.rglob("*.py"))


def room_of(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports_of(path):
    """Every module that is imported anywhere in a file, also within functions and for type checkers alone."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            yield node.module


def test_all_rooms_are_known():
    found = {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert found == {*ROOMS}
    assert {path.stem for path in PACKAGE.glob("*.py")} == {"__init__", "__main__", *FOR_ALL}


@pytest.mark.parametrize("path", [path for path in FILES if path.parent != PACKAGE], ids=lambda path: str(path.name))
def test_imports_run_one_way(path):
    own = room_of(path)
    for module in imports_of(path):
        if module.split(".")[0] == "lightning_trak":
            room = module.split(".")[1]
            assert room in FOR_ALL or ROOMS.index(room) <= ROOMS.index(own), f"{own} imports {module}"


@pytest.mark.parametrize("path", sorted((PACKAGE / "trainer").rglob("*.py")), ids=lambda path: str(path.name))
def test_rooms_of_the_trainer_import_one_way(path):
    def place(name):
        return OF_TRAINER.index(name) if name in OF_TRAINER else len(OF_TRAINER)

    own = path.relative_to(PACKAGE / "trainer").parts[0].removesuffix(".py")
    for module in imports_of(path):
        if module.startswith("lightning_trak.trainer."):
            assert place(module.split(".")[2]) <= place(own), f"{own} imports {module}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.name))
def test_one_file_alone_imports_lightning(path):
    """And for type checkers alone its sister package. The command line is derived from one of Lightning's classes."""
    packages = {module.split(".")[0] for module in imports_of(path)}
    if path not in (PACKAGE / "trainer" / "host" / "framework.py", PACKAGE / "trainer" / "cli.py"):
        assert not packages & {"lightning", "pytorch_lightning", "lightning_fabric"}


def test_no_module_imports_itself_in_a_circle():
    edges = {}
    for path in FILES:
        name = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
        edges[name] = {module for module in imports_of(path) if module.startswith("lightning_trak")} - {name}
    known = set(edges)

    def visit(name, trail):
        assert name not in trail, f"a circle: {' → '.join([*trail, name])}"
        if name not in done:
            for other in edges[name] & known:
                if not name.startswith(f"{other}."):  # of a room its parts import others, not the room
                    visit(other, [*trail, name])
            done.add(name)

    done = set()
    for name in sorted(known):
        visit(name, [])


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.name))
def test_names_and_documents(path):
    assert path.name in ("__init__.py", "__main__.py") or not path.name.startswith("_")
    assert path.stem not in {"utils", "helpers", "misc", "common"}
    document = ast.get_docstring(ast.parse(path.read_text()))
    assert document is not None


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.name))
def test_no_detour_for_type_checkers(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            assert "lightning_trak" not in ast.unparse(node)


def test_rooms_need_no_lightning():
    """Imported with Lightning out of reach; the package's root, which has it all, is left out."""
    script = f"""if True:
        import importlib, pkgutil, sys, types
        root = types.ModuleType("lightning_trak")
        root.__path__ = [{str(PACKAGE)!r}]
        sys.modules["lightning_trak"] = root
        sys.modules["lightning"] = sys.modules["pytorch_lightning"] = None
        rooms = {[room for room in ROOMS if room not in ("trainer", "evaluation")]!r}
        for place, name in enumerate(rooms):
            room = importlib.import_module("lightning_trak." + name)
            for module in pkgutil.walk_packages(room.__path__, room.__name__ + "."):
                importlib.import_module(module.name)
            assert not any("lightning_trak." + later in sys.modules for later in rooms[place + 1:]), name"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", sorted(Path(__file__).parent.rglob("*.py")), ids=lambda path: path.name)
def test_no_test_patches_what_is_private(path):
    """Private names and constants may change; a test that needs another value passes an argument."""
    assert not re.search(r"(setattr|patch)\(\s*\"lightning_trak[\w.]*\._(?!_)", path.read_text())
