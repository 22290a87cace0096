"""What all tests share: a tiny checkpoint on disk, an empty place to work in, and no network."""

from __future__ import annotations

import os
import shutil

if "PYTEST_XDIST_WORKER" in os.environ:  # two processes share the cores: threads that wait for each other would spin
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # or engines of both take the same core

import pytest
from hypothesis import settings

from tests.helpers.disks import disks
from tests.helpers.models import POCKET, random_model, save_checkpoint

settings.register_profile("everywhere", deadline=None, derandomize=True)  # a slow machine is no failure
settings.load_profile("everywhere")


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item):
    """No test, no fixture and none of their processes use the network; this machine only where a mark says so."""
    here = any(item.get_closest_marker(name) for name in ("vllm", "loopback"))
    os.environ["TESTS_SOCKETS"] = "loopback" if here else "none"
    return (yield)


@pytest.fixture(autouse=True)
def sockets_denied(tmp_path_factory, monkeypatch):
    """A file of what was tried and denied, which must not exist in the end: code may swallow the error."""
    told = tmp_path_factory.getbasetemp() / "sockets-denied"
    monkeypatch.setenv("TESTS_SOCKETS_DENIED", str(told))
    yield told
    if told.exists():
        tried = told.read_text()
        told.unlink()
        pytest.fail(f"the network was asked for:\n{tried}")


@pytest.fixture(scope="session")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(POCKET)


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory, tokenizer):
    """A random Llama of 3 layers with 2 KV heads, saved once; copy it before changing it."""
    return save_checkpoint(random_model("llama"), tmp_path_factory.mktemp("checkpoints") / "tiny", tokenizer)


@pytest.fixture
def checkpoint(tiny_checkpoint, tmp_path):
    """A copy of the tiny checkpoint that a test may break."""
    return shutil.copytree(tiny_checkpoint, tmp_path / "tiny")


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """An empty current folder."""
    place = tmp_path / "workplace"
    place.mkdir()
    monkeypatch.chdir(place)
    return place


@pytest.fixture
def disk(tmp_path):
    """A file system of 1 MiB. Gives its folder and a function that mounts it with other options."""
    yield from disks(tmp_path)
