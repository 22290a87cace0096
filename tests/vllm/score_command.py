"""`kvprofile score` on a checkpoint in a process of its own, as a user starts it, in float32 on two short documents."""

from __future__ import annotations

import subprocess
import sys

from tests.vllm.engine import environment

CORPUS = ["--corpus", "generate:prose:1:6000", "--corpus", "generate:tables:2:6000", "--context-tokens", "400"]
SMALL = ["score", "--dtype", "float32", "--chunk-tokens", "50", "--sink-tokens", "16", "--recent-tokens", "64", *CORPUS]


def start(checkpoint, output, *options, **settings):
    command = [sys.executable, "-m", "kvprofile", *SMALL, str(checkpoint), "--output", str(output), *options]
    env = environment()
    for name in ("VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_CPU_KVCACHE_SPACE", "VLLM_LOGGING_LEVEL"):
        del env[name]  # as a user starts it
    return subprocess.Popen(command, env=env | settings, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process):
    out, errors = process.communicate(timeout=900)
    assert process.returncode == 0, errors[-4000:]
    return out, errors
