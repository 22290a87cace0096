"""What a stranger installs: sdist and wheel build, and the wheel works in an empty environment without a network.

The environment borrows torch and the other dependencies of this one through a .pth file, so nothing is downloaded.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from email import message_from_bytes

import pytest

from kvprofile import __version__
from tests.helpers.models import POCKET, ROOT

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """(sdist, wheel); the wheel is built from the sdist, so the sdist lacks nothing."""
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)],
        check=True,
        capture_output=True,
    )
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    return sdist, wheel


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    """Run a program of an environment that has the wheel and no kvprofile but that, away from the repository."""
    folder = tmp_path_factory.mktemp("empty")
    venv.create(folder / "env", with_pip=True)
    site = next((folder / "env").glob("lib/python*/site-packages"))
    (site / "rest.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    denied = folder / "sockets-denied"
    env = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "LLM_", "HF_"))}
    env |= {"TESTS_SOCKETS": "none", "TESTS_SOCKETS_DENIED": str(denied)}

    def run(*words, code=0):
        command = [str(folder / "env" / "bin" / words[0]), *map(str, words[1:])]
        done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == code, done.stderr[-3000:]
        assert not denied.exists(), denied.read_text()
        return done.stdout

    run("python", "-m", "pip", "install", "--no-index", "--ignore-installed", "--no-deps", built[1])
    shutil.copy(ROOT / "tests" / "no_network" / "sitecustomize.py", site)
    return run


def test_the_wheel_holds_the_package_and_its_data_and_nothing_else(built):
    with zipfile.ZipFile(built[1]) as wheel:
        names = set(wheel.namelist())
        metadata = message_from_bytes(wheel.read(f"kvprofile-{__version__}.dist-info/METADATA"))
    tops = {name.partition("/")[0] for name in names}
    assert tops == {"kvprofile", f"kvprofile-{__version__}.dist-info"}
    assert not [name for name in names if name.endswith(".pyc") or "/tests/" in name]
    assert [name for name in names if name.endswith(".safetensors")] == ["kvprofile/data/pocket/model.safetensors"]
    loaded = {file.name for file in POCKET.iterdir() if file.suffix in (".json", ".jinja", ".safetensors")}
    assert loaded - {"training.json"} <= {name.removeprefix("kvprofile/data/pocket/") for name in names}
    for folder, place in (("corpora", "corpora"), ("benchmarks/documents", "documents")):
        wanted = {file.relative_to(ROOT / folder).as_posix() for file in (ROOT / folder).rglob("*") if file.is_file()}
        assert wanted <= {name.removeprefix(f"kvprofile/data/{place}/") for name in names}
    for name in ("bench/providers.toml", "report/templates/page.html", "report/templates/page.css"):
        assert f"kvprofile/{name}" in names
    assert f"kvprofile-{__version__}.dist-info/licenses/LICENSE" in names
    needed = [item for item in metadata.get_all("Requires-Dist") if "extra ==" not in item]
    assert {"torch", "transformers"} <= {re.match(r"[\w.-]+", item)[0] for item in needed}
    assert not [item for item in needed if item.startswith(("vllm", "openai", "mkdocs", "pytest"))]
    assert set(metadata.get_all("Provides-Extra")) == {"bench", "dev", "docs", "documents", "gguf", "ray"}
    assert metadata["Version"] == __version__


def test_the_sdist_holds_what_its_tests_need(built):
    with tarfile.open(built[0]) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    assert {"models/pocket/model.safetensors", "docs/commands.md", "mkdocs.yml", "constraints.txt"} <= names
    assert {"tests/conftest.py", "Makefile", "scripts/write_reference.py"} <= names
    assert not [name for name in names if name.startswith(("runs/", "site/", ".venv")) or name.endswith(".partial")]


def test_the_command_starts(installed):
    assert installed("kvprofile", "--version").strip() == __version__
    assert "score" in installed("kvprofile", "--help")
    where = installed("python", "-c", "import kvprofile; print(kvprofile.__file__)")
    assert str(ROOT) not in where


def test_the_first_three_steps_of_the_tutorial_run_from_the_wheel_alone(installed):
    """In an empty folder, and no step asks for the network: `installed` fails where one does."""
    page = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
    steps = re.findall(r"^\$ (kvprofile (?:score|show|evaluate) .*)$", page, re.MULTILINE)
    assert [step.split()[1] for step in steps] == ["score", "show", "evaluate"]
    score, show, evaluate = (step.split() for step in steps)
    made = json.loads(installed(*score, "--json"))
    assert (made["model"], made["file"]) == ("pocket", "models/kv_budget/pocket.json")
    assert "12 of 24 heads keep the whole context" in installed(*show)
    assert "kvzip 0.5" in installed(*evaluate)
    assert "ok" in installed("kvprofile", "validate")
    installed("kvprofile", "plan", "models/pocket", "--gpu-memory", "1GiB", "--context", "500")
    installed("kvprofile", "export", "pocket", "--format", "vllm", "--retention", "0.5", "--output", "vllm.json")
    installed("kvprofile", "report", ROOT / "tests/data/run-record-v1.json", "--output", "page.html")
    names = installed("python", "-c", "from kvprofile.corpus.sources import bundled_names as n; print(*n())").split()
    assert names == sorted(folder.name for folder in (ROOT / "corpora").iterdir() if folder.is_dir())
    planned = json.loads(
        installed("kvprofile", "bench", "--model", "models/pocket", "--preset", "seed", "--dry-run", "--json")
    )
    assert planned["model"] == "pocket"


def test_vllm_would_find_the_plugin(installed):
    code = "from importlib.metadata import entry_points as e; print([p.value for p in e(group='vllm.general_plugins')])"
    assert "kvprofile.runtime.gate:register" in installed("python", "-c", code)


@pytest.mark.parametrize(
    "module", ["kvprofile.runtime.gate", "kvprofile.budget.store", "kvprofile.budget.runtime_file"]
)
def test_the_slim_parts_do_not_need_torch(installed, module):
    code = f"import sys; sys.modules.update(torch=None, transformers=None); import kvprofile.runtime, {module}"
    installed("python", "-c", code)
