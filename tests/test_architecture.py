"""Imports go one way: a room imports only from rooms on a lower floor, and every file is in a room, as is its test."""

import ast
import re
from pathlib import Path

import pytest
from helpers import house
from helpers.house import FLOORS
from helpers.places import ROOT

MOST_LINES, MOST_FILES = 360, 14
PACKAGE = ROOT / "kava_trainer"
ROOMS = set().union(*FLOORS)
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE or path.name == "cli.py")
TESTS = ROOT / "tests"
TEST_FILES = sorted(TESTS.rglob("*.py"))


def name_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").as_posix()


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def floor_of(room: str) -> int:
    return next(number for number, floor in enumerate(FLOORS) if room in floor)


def imported_rooms(path: Path) -> set[str]:
    """The other rooms that a file imports from, wherever in it the import stands."""
    package, found = list(path.relative_to(PACKAGE).parts[:-1]), set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1]
            modules = [[*base, *(node.module.split(".") if node.module else [alias.name])] for alias in node.names]
            found |= {module[0] for module in modules if module != ["__version__"]}  # defined before all else
        elif isinstance(node, ast.ImportFrom | ast.Import):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            assert not any(name.split(".")[0] == "kava_trainer" for name in names), f"{path} imports by absolute name"
    return found - {room_of(path)}


def test_every_file_is_in_a_room():
    assert {room_of(path) for path in FILES} == ROOMS
    assert {path.name for path in PACKAGE.glob("*.py")} == {"__init__.py", "__main__.py", "cli.py"}


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_a_room_imports_only_from_floors_below(path):
    for room in imported_rooms(path):
        assert floor_of(room) > floor_of(room_of(path)), f"{name_of(path)} imports from {room}"


def test_files_are_short_and_the_entry_point_holds_no_logic():
    for path in FILES:
        assert len(path.read_text().splitlines()) <= MOST_LINES, path
    assert len((ROOT / "run_kava.py").read_text().splitlines()) < 120


def test_contributing_shows_the_rooms_as_they_are():
    text = house.DOCUMENT.read_text(encoding="utf-8")
    assert house.document(text) == text, "Write it anew: python tests/helpers/house.py"


def test_rooms_are_small():
    for folder in {path.parent for path in FILES if path.name != "cli.py"}:
        assert len(list(folder.glob("*.py"))) <= MOST_FILES, folder


def test_tests_are_in_the_rooms_of_the_package():
    folders = {path.parent.relative_to(TESTS) for path in TEST_FILES if path.name.startswith("test_")}
    assert folders - {Path(), Path("runs_whole")} <= {path.parent.relative_to(PACKAGE) for path in FILES}
    assert {path.name for path in TESTS.glob("*.py")} == {"conftest.py", "test_architecture.py", "test_cli.py"}


def test_no_test_imports_another():
    """What they share is in `helpers`."""
    for path in TEST_FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for name in names:
                assert not re.search(r"(^|\.)(test_\w+|tests|conftest)(\.|$)", name), f"{path} imports {name}"


def test_nothing_of_the_package_is_replaced_by_a_dotted_name():
    """Such a name is found neither by a search for the function nor by whoever renames its module."""
    for path in TEST_FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "setattr":
                assert not ast.unparse(node.args[0]).lstrip("f").startswith("'kava_trainer"), f"{path}:{node.lineno}"
