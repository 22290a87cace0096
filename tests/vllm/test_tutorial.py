"""The tutorial's last two commands as they stand on the page: serve with a budget, ask whether it is in force."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import urllib.request

import pytest

from kvprofile.corpus.sources import load_corpus
from tests.helpers.docs_pages import blocks, commands
from tests.helpers.models import POCKET, ROOT
from tests.vllm.served import running

pytest.importorskip("vllm")
pytestmark = [pytest.mark.vllm, pytest.mark.slow]

SERVE, DOCTOR, CURL = (
    command
    for block in blocks("console")
    if block.page == "docs/tutorial.md" and block.mark == "served"
    for command in commands(block)
)


def given_back(address, env):
    """MiB that the page's doctor command reports, after comparing its line with the page's."""
    words = [word.replace("http://127.0.0.1:8000", address) for word in DOCTOR.words[1:]]
    run = subprocess.run(
        [sys.executable, "-m", "kvprofile", *words], env=env, capture_output=True, text=True, check=False
    )
    said = " ".join(run.stdout.split())
    shown = " ".join(" ".join(DOCTOR.shown).replace("http://127.0.0.1:8000", address).split())
    match = re.fullmatch("([0-9.e+]+)".join(map(re.escape, shown.split("..."))), said)
    assert match, f"{shown}\n{said}\n{run.stderr}"
    assert run.returncode == 0
    return float(match[1])


def test_the_tutorial_serves_and_frees(tmp_path):
    place = tmp_path / "models"
    (place / "kv_budget").mkdir(parents=True)
    (place / "pocket").symlink_to(POCKET)
    shutil.copy(ROOT / "models" / "kv_budget" / "pocket.json", place / "kv_budget")
    env = {**os.environ, **SERVE.environment, "VLLM_CPU_KVCACHE_SPACE": "1"}
    log = tmp_path / "server.log"
    with running([sys.executable, *SERVE.words[1:]], log, env, cwd=tmp_path) as address:
        assert "kvprofile: 12 of 24 KV heads are full, from models/kv_budget/pocket.json" in log.read_text()
        assert given_back(address, env) == 0
        body = json.loads(CURL.words[CURL.words.index("-d") + 1])
        body["prompt"] = load_corpus("prose", 1).texts[0].text[:4000]
        request = urllib.request.Request(  # noqa: S310 - our own server
            next(word for word in CURL.words if word.startswith("http")).replace("http://127.0.0.1:8000", address),
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=120) as answer:  # noqa: S310 - our own server
            assert json.load(answer)["usage"]["completion_tokens"] > 0
        assert given_back(address, env) > 0, shlex.join(SERVE.words)
