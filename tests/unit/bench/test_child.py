"""A child process that becomes another module and ends with its parent, however that ends."""

from __future__ import annotations

import subprocess
import sys
import time

import psutil
import pytest

from kvprofile.bench.engines.vllm_server import EngineOptions, arguments, child_command, clean_environment, reason_in

PARENT = """
import subprocess, sys, time
from kvprofile.bench.engines.vllm_server import child_command
child = subprocess.Popen([*child_command("http.server"), "0", "--bind", "127.0.0.1"], stdout=subprocess.DEVNULL)
print(child.pid, flush=True)
time.sleep(600)
"""


@pytest.mark.loopback
@pytest.mark.skipif(sys.platform != "linux", reason="asked of the kernel, which must be Linux")
def test_a_killed_parent_takes_its_child_with_it():
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    child = psutil.Process(int(parent.stdout.readline()))
    deadline = time.monotonic() + 60
    while "http.server" not in child.cmdline()[1:3] and time.monotonic() < deadline:
        time.sleep(0.1)
    assert "http.server" in child.cmdline()[1:3]  # it has become the module: same process, no launcher in between
    parent.kill()
    parent.wait()
    gone, alive = psutil.wait_procs([child], timeout=30)
    assert gone
    assert not alive


def test_the_parent_s_number_is_checked():
    run = subprocess.run([*child_command("http.server")[:3], "1", "http.server"], capture_output=True, check=False)
    assert run.returncode == 1


def test_engines_see_no_keys_and_no_settings(monkeypatch):
    monkeypatch.setenv("MOONSHOT_API_KEY", "sk-1")
    monkeypatch.setenv("LLM_KVZIP_ENABLED", "1")
    found = clean_environment(["MOONSHOT_API_KEY"])
    assert "MOONSHOT_API_KEY" not in found
    assert "LLM_KVZIP_ENABLED" not in found
    assert found["PATH"]


def test_arguments_of_the_server():
    options = EngineOptions(pool_bytes=2**26, block_tokens=32, enforce_eager=True, extra=("--swap-space", "0"))
    found = " ".join(arguments("org/model", "model", options))
    assert "--model org/model --served-model-name model" in found
    assert "--kv-cache-memory-bytes 67108864" in found
    assert "--no-enable-prefix-caching" in found
    assert found.endswith("--swap-space 0")


@pytest.mark.parametrize(
    ("log", "reason"),
    [
        (
            "INFO starting\nValueError: kvprofile does not serve with a KV connector\n"
            "RuntimeError: Engine core initialization failed. See root cause above.\n",
            "ValueError: kvprofile does not serve with a KV connector",
        ),
        (
            "(EngineCore pid=3) torch.OutOfMemoryError: no room\nRuntimeError: Engine core initialization failed.\n",
            "OutOfMemoryError: no room",
        ),
        ("INFO all is well\n", "it ended without saying why"),
    ],
)
def test_the_reason_in_a_log(tmp_path, log, reason):
    (tmp_path / "log").write_text(log)
    assert reason_in(tmp_path / "log") == reason
