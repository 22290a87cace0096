"""What a stranger installs: sdist and wheel build, and the wheel works in an empty environment without a network.

The environment borrows torch and the other dependencies of this one through a .pth file, so nothing is downloaded.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from email import message_from_bytes

import pytest

from kvprofile import __version__
from tests.models import POCKET, ROOT

pytestmark = pytest.mark.slow

NO_NETWORK = """
import socket

def refuse(*arguments, **options):
    raise OSError("no network in this test")

socket.getaddrinfo = socket.create_connection = socket.socket.connect = refuse
"""


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
    env = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "LLM_", "HF_"))}

    def run(*words, code=0):
        command = [str(folder / "env" / "bin" / words[0]), *map(str, words[1:])]
        done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == code, done.stderr[-3000:]
        return done.stdout

    run("python", "-m", "pip", "install", "--no-index", "--ignore-installed", "--no-deps", built[1])
    (site / "sitecustomize.py").write_text(NO_NETWORK)
    return run


def test_the_wheel_holds_the_package_and_its_data_and_nothing_else(built):
    with zipfile.ZipFile(built[1]) as wheel:
        names = set(wheel.namelist())
        metadata = message_from_bytes(wheel.read(f"kvprofile-{__version__}.dist-info/METADATA"))
    tops = {name.partition("/")[0] for name in names}
    assert tops == {"kvprofile", f"kvprofile-{__version__}.dist-info"}
    assert not [name for name in names if name.endswith((".pyc", ".safetensors")) or "/tests/" in name]
    for folder, place in (("corpora", "corpora"), ("benchmarks/documents", "documents")):
        wanted = {file.relative_to(ROOT / folder).as_posix() for file in (ROOT / folder).rglob("*") if file.is_file()}
        assert wanted <= {name.removeprefix(f"kvprofile/data/{place}/") for name in names}
    for name in ("bench/providers.toml", "report/templates/page.html", "report/templates/page.css"):
        assert f"kvprofile/{name}" in names
    assert f"kvprofile-{__version__}.dist-info/licenses/LICENSE" in names
    needed = [item for item in metadata.get_all("Requires-Dist") if "extra ==" not in item]
    assert {"torch", "transformers"} <= {re.match(r"[\w.-]+", item)[0] for item in needed}
    assert not [item for item in needed if item.startswith(("vllm", "openai", "mkdocs", "pytest"))]
    assert set(metadata.get_all("Provides-Extra")) == {"bench", "dev", "docs"}
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


def test_it_profiles_with_the_corpora_it_brings_and_asks_no_network(installed):
    words = (
        "score",
        POCKET,
        "--corpus",
        "prose",
        "--documents",
        "1",
        "--context-tokens",
        "200",
        "--chunk-tokens",
        "200",
    )
    made = json.loads(installed("kvprofile", *words, "--output", "made.json", "--json"))
    assert made["file"] == "made.json"
    assert "ok" in installed("kvprofile", "validate", "made.json")
    installed("kvprofile", "export", "made.json", "--format", "vllm", "--retention", "0.5", "--output", "vllm.json")
    installed("kvprofile", "report", ROOT / "tests/data/run-record-v1.json", "--output", "page.html")
    names = installed("python", "-c", "from kvprofile.corpus.sources import bundled_names as n; print(*n())").split()
    assert names == sorted(folder.name for folder in (ROOT / "corpora").iterdir() if folder.is_dir())


def test_vllm_would_find_the_plugin(installed):
    code = "from importlib.metadata import entry_points as e; print([p.value for p in e(group='vllm.general_plugins')])"
    assert "kvprofile.runtime.gate:register" in installed("python", "-c", code)


@pytest.mark.parametrize(
    "module", ["kvprofile.runtime.gate", "kvprofile.budget.store", "kvprofile.budget.runtime_file"]
)
def test_the_slim_parts_need_no_torch(installed, module):
    code = f"import sys; sys.modules.update(torch=None, transformers=None); import kvprofile.runtime, {module}"
    installed("python", "-c", code)
