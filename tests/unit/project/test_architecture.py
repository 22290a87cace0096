"""The house rules that code can check: which package may import which, and what importing costs."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys

import pytest

from tests.helpers.models import ROOT

PACKAGE = ROOT / "kvprofile"

ARROWS = {
    "environment": set(),
    "errors": set(),
    "files": {"errors"},
    "run_folder": {"errors", "files"},
    "progress": set(),
    "prometheus": {"errors"},
    "sizes": set(),
    "statistics": set(),
    "unsupported": set(),
    "instrumentation": {"prometheus"},
    "budget": {"environment", "errors", "files", "sizes"},
    "corpus": {"errors", "files"},
    "questions": {"corpus", "errors", "files"},
    "records": {"budget", "environment", "errors", "files"},
    "checkpoint": {"budget", "errors", "files"},
    "capture": {"budget", "environment", "errors", "unsupported"},
    "runtime": {"budget", "capture", "environment", "errors", "files", "prometheus", "unsupported"},
    "scoring": {
        "budget",
        "capture",
        "checkpoint",
        "corpus",
        "environment",
        "errors",
        "files",
        "progress",
        "run_folder",
    },
    "evaluate": {
        "budget",
        "checkpoint",
        "errors",
        "files",
        "progress",
        "questions",
        "run_folder",
        "scoring",
        "statistics",
    },
    "report": {"budget", "errors", "files", "records", "statistics"},
    "client": {"environment", "errors", "instrumentation", "runtime", "scoring"},
    "bench": {
        "budget",
        "corpus",
        "environment",
        "errors",
        "files",
        "instrumentation",
        "questions",
        "records",
        "run_folder",
        "runtime",
        "sizes",
        "statistics",
    },
    "verify": {
        "bench",
        "budget",
        "checkpoint",
        "corpus",
        "environment",
        "errors",
        "evaluate",
        "files",
        "runtime",
        "scoring",
    },
    "cli": {
        "bench",
        "budget",
        "checkpoint",
        "corpus",
        "errors",
        "evaluate",
        "files",
        "progress",
        "questions",
        "records",
        "report",
        "runtime",
        "scoring",
        "sizes",
        "verify",
    },
    "__main__": {"cli"},
}
"""Who may import whom inside kvprofile; the version, in kvprofile itself, is for all."""


MODULES = {
    ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file
    for file in PACKAGE.rglob("*.py")
}


def imports_of(file):
    """Modules of kvprofile that a file imports, wherever in the file; the package itself, for its version, aside."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.ImportFrom):
            names = [(f"{node.module}.{alias.name}", node.module) for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [(alias.name, "") for alias in node.names]
        for as_module, otherwise in names:
            found = as_module if as_module in MODULES else otherwise
            if found in MODULES and found != "kvprofile":
                yield found


def test_every_part_has_its_arrows():
    parts = {
        p.stem if p.is_file() else p.name
        for p in PACKAGE.iterdir()
        if p.suffix == ".py" or (p / "__init__.py").is_file()
    }
    assert parts - {"__init__"} <= set(ARROWS)


@pytest.mark.parametrize("part", sorted(ARROWS))
def test_arrows_point_one_way(part):
    files = [PACKAGE / f"{part}.py"] if (PACKAGE / f"{part}.py").is_file() else list((PACKAGE / part).rglob("*.py"))
    for file in files:
        foreign = {name.split(".")[1] for name in imports_of(file)} - ARROWS[part] - {part}
        assert not foreign, f"{file.relative_to(ROOT)} imports kvprofile.{', kvprofile.'.join(sorted(foreign))}"


def test_no_import_goes_in_a_circle():
    """Imports inside functions and for types count, or they would hide one."""
    order = graphlib.TopologicalSorter({name: {*imports_of(file)} - {name} for name, file in MODULES.items()})
    try:
        order.prepare()
    except graphlib.CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))


def test_names_of_files_say_which():
    """``base`` is the base of its folder, and a command is called what its library module is."""
    files = [file for file in MODULES.values() if file.stem not in ("__init__", "base") and file.parent.name != "cli"]
    names = [file.name for file in files]
    assert sorted(names) == sorted(set(names))


def test_the_gate_to_the_runtime_is_light():
    """Every process of every vLLM loads it where kvprofile is installed."""
    assert set(imports_of(MODULES["kvprofile.runtime.gate"])) <= {
        "kvprofile.environment",
        "kvprofile.runtime.settings",
        "kvprofile.runtime.patches",
    }
    found = loaded_by("import kvprofile.runtime.gate as gate; gate.register()", whole=True)
    ours = {name for name in found if name.startswith("kvprofile.")}
    assert ours == {"kvprofile.environment", "kvprofile.runtime", "kvprofile.runtime.gate"}
    assert {name.partition(".")[0] for name in found} - {"kvprofile"} <= {*sys.stdlib_module_names, "__main__"}


def test_what_runs_inside_vllm_imports_torch_and_vllm_alone():
    allowed = {
        "__future__",
        "collections",
        "dataclasses",
        "functools",
        "json",
        "typing",
        "safetensors",
        "torch",
        "vllm",
        "kvprofile",
    }
    for name in ("marks", "rows", "layout", "watch", "worker", "scheduler"):
        for node in ast.walk(ast.parse((PACKAGE / "capture" / f"{name}.py").read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            assert {imported.partition(".")[0] for imported in names} <= allowed
            assert "kvprofile.errors" not in names, "an error in a worker is no line for a user"


def loaded_by(statement, whole=False):
    code = f"import sys; before = set(sys.modules); {statement}; print(*{{*sys.modules}} - before)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return {name if whole else name.partition(".")[0] for name in run.stdout.splitlines()[-1].split()}


HEAVY = {"torch", "transformers", "datasets", "scipy", "matplotlib", "vllm", "numpy"}


@pytest.mark.parametrize(
    ("statement", "banned"),
    [
        ("import kvprofile.cli", HEAVY | {"pydantic"}),
        ("import kvprofile.budget.store, kvprofile.budget.allocate", HEAVY),
        ("import kvprofile.budget.runtime_file, kvprofile.budget.servable", HEAVY | {"typer", "rich"}),
        ("from kvprofile.cli import run; run(['validate', 'models/kv_budget'])", HEAVY),
        ("import kvprofile.capture, kvprofile.capture.worker, kvprofile.capture.marks", HEAVY),
        ("import kvprofile.scoring.vllm_engine", {"vllm"}),
    ],
)
def test_imports_stay_light(statement, banned):
    assert not loaded_by(statement) & banned


def test_files_stay_short():
    long = {
        str(file.relative_to(ROOT)): lines
        for file in PACKAGE.rglob("*.py")
        if (lines := len(file.read_text(encoding="utf-8").splitlines())) > 420
    }
    assert not long
