"""docs/architecture.md names modules, functions and types that are there."""

from __future__ import annotations

import re

import pytest

from tests.helpers.docs_pages import ROOT

PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
PACKAGE = ROOT / "kvprofile"
DOTTED = sorted(set(re.findall(r"`([a-z_]+(?:\.[a-z_]+)+)`", PAGE)) - {"report.html"})
TYPES = sorted(set(re.findall(r"`([A-Z]\w+[a-z]\w*)`", PAGE)))
SOURCE = "\n".join(file.read_text(encoding="utf-8") for file in PACKAGE.rglob("*.py"))


def test_there_is_something_to_look_up():
    assert len(DOTTED) > 15
    assert len(TYPES) > 8


@pytest.mark.parametrize("name", DOTTED)
def test_modules_and_their_functions_exist(name):
    place, last = PACKAGE.joinpath(*name.split(".")[:-1]), name.rpartition(".")[2]
    if place.is_dir():
        assert (place / f"{last}.py").is_file() or (place / last / "__init__.py").is_file()
    else:
        assert re.search(rf"^def {last}\b", place.with_suffix(".py").read_text(encoding="utf-8"), re.MULTILINE)


@pytest.mark.parametrize("name", TYPES)
def test_types_exist(name):
    assert re.search(rf"^class {name}\b", SOURCE, re.MULTILINE)
