"""`kvprofile score` in a process of its own, on texts that are generated; stopped at a chunk if a test wants."""

from __future__ import annotations

import subprocess
import sys
import time

CORPUS = ["--corpus", "generate:prose:1:6000", "--corpus", "generate:tables:2:6000"]
SMALL = ["--context-tokens", "640", "--chunk-tokens", "32", "--dtype", "float32", "--device", "cpu"]
CHUNKS = 2 * 640 // 32


def command(checkpoint, output, *options):
    return [
        sys.executable,
        "-m",
        "kvprofile",
        "score",
        str(checkpoint),
        *CORPUS,
        *SMALL,
        "--output",
        str(output),
        *options,
    ]


def start(checkpoint, output, *options):
    return subprocess.Popen(
        command(checkpoint, output, *options), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(checkpoint, output, *options):
    run = subprocess.run(
        command(checkpoint, output, *options), capture_output=True, text=True, timeout=300, check=False
    )
    assert run.returncode == 0, run.stderr
    return run


def wait_for_chunks(output, count, process):
    folder = output.with_name(output.name + ".partial")
    deadline = time.monotonic() + 120
    sums = folder / "sums.safetensors"  # without its sums a chunk does not count as finished
    while len(list(folder.glob("document-*.safetensors"))) < count or not sums.exists():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.005)
