"""`kvprofile verify` on a real engine, with what is planted into it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

from tests.helpers.models import POCKET, ROOT
from tests.vllm.planted import plugin_path

SMALL = ["--dtype", "float32", "--block-size", "32", "--enforce-eager", "--max-model-len", "512"]


def budget_in(folder):
    """A copy of models/pocket's budget file and probe."""
    folder.mkdir(exist_ok=True)
    for name in ("pocket.json", "pocket.probe.safetensors"):
        shutil.copy(ROOT / "models" / "kv_budget" / name, folder / name)
    return folder / "pocket.json"


def environment_with(tmp_path, planted="", **settings):
    """The environment of a command whose engines load the plugin of tests."""
    found = {name: value for name, value in os.environ.items() if not name.startswith("LLM_KVZIP_")}
    path = tmp_path / "plugin"
    if not path.exists():
        plugin_path(path)
    found["PYTHONPATH"] = os.pathsep.join([str(path), found["PYTHONPATH"]])
    return found | {"PLANTED": planted, "HF_HUB_OFFLINE": "1"} | settings


def verify(budget, env, *more, model=POCKET):
    """Run the command, for whole heads unless asked. Gives its exit code, what it found (with --json), and stderr."""
    more = more if "--kind" in more else (*more, "--kind", "whole")
    words = ["verify", str(model), "--profile", str(budget), *SMALL, *more, "--json"]
    run = subprocess.run(
        [sys.executable, "-m", "kvprofile", *words], env=env, cwd=ROOT, capture_output=True, text=True, timeout=1500,
        check=False,
    )  # fmt: skip
    return run.returncode, json.loads(run.stdout) if run.stdout else None, run.stderr


def failed(found):
    """Names of checks that did not hold, with what they said first."""
    return {
        check["name"]: check["problems"][0]
        for result in found["results"]
        for check in result["checks"]
        if not check["good"]
    }
