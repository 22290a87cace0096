"""Tests lie where the package's modules do, share helpers and nothing else, and unit tests stay light."""

from __future__ import annotations

import ast
from pathlib import Path

from tests.helpers.models import ROOT

TESTS = ROOT / "tests"
UNIT = TESTS / "unit"
FILES = sorted(TESTS.rglob("*.py"))
HEAVY = {"vllm", "playwright", "axe_playwright_python"}
ENGINES = ("tests.vllm", "tests.browser")


def imported(file: Path) -> set[str]:
    """Every module that a file imports or asks pytest to import, wherever it stands in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("importorskip", "import_module")):
            names |= {each.value for each in node.args if isinstance(each, ast.Constant)}
    return names


def test_folders_of_unit_tests_are_packages_of_kvprofile():
    folders = {path.name for path in UNIT.iterdir() if path.is_dir() and path.name != "__pycache__"}
    packages = {path.parent.name for path in (ROOT / "kvprofile").glob("*/__init__.py")}
    assert folders - packages == {"project"}  # what is about the repository and not about one package


def test_single_modules_have_their_tests_next_to_the_folders():
    modules = {path.stem for path in (ROOT / "kvprofile").glob("*.py")}
    assert {path.stem.removeprefix("test_") for path in UNIT.glob("test_*.py")} <= modules


def test_every_folder_of_tests_is_a_package():
    """Files of the same name in two folders are one module otherwise."""
    assert {file.parent for file in FILES if file.name.startswith("test_")} <= {
        file.parent for file in FILES if file.name == "__init__.py"
    }


def test_tests_do_not_import_each_other():
    """What several need is in tests/helpers, in a conftest, or in tests/vllm next to the tests that drive engines."""
    others = {
        str(file.relative_to(TESTS)): names
        for file in FILES
        if (names := [name for name in imported(file) if name.startswith("tests.") and ".test_" in name])
    }
    assert others == {}


def test_unit_tests_need_neither_vllm_nor_a_browser():
    """`make test-fast` runs tests/unit."""
    heavy = {
        str(file.relative_to(TESTS)): names
        for file in UNIT.rglob("*.py")
        if (names := [name for name in imported(file) if name.partition(".")[0] in HEAVY or name.startswith(ENGINES)])
    }
    assert heavy == {}
