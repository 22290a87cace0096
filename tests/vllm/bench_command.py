"""`kvprofile bench` on a real engine in a process of its own, and the servers that it starts."""

from __future__ import annotations

import os
import subprocess
import sys

import psutil

from tests.helpers.models import POCKET, ROOT

OPTIONS = [
    "--model", str(POCKET), "--profile", "models/kv_budget/pocket.json", "--dtype", "float32",
    "--max-model-len", "4096", "--block-tokens", "32", "--pool-memory", "64MiB", "--enforce-eager",
    "--max-output-tokens", "24", "--requests", "6", "--warmup-requests", "1", "--concurrency", "3",
]  # fmt: skip


def command(*arguments):
    env = {name: value for name, value in os.environ.items() if not name.startswith("LLM_KVZIP_")}
    return subprocess.Popen(
        [sys.executable, "-m", "kvprofile", *arguments],
        env={**env, "HF_HUB_OFFLINE": "1"},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def servers_for(folder):
    """vLLM's processes that write into a folder's logs."""
    found = []
    for process in psutil.process_iter(["pid"]):
        try:
            if any(str(folder) in (opened.path or "") for opened in process.open_files()):
                found.append(process.pid)
        except psutil.Error:
            continue
    return found
