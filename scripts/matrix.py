"""Try scoring and evaluation on other releases of torch and transformers: `make test-matrix`.

`python scripts/matrix.py transformers==5.22.0` tries one of your own; several requirements in one argument, separated
by commas, are tried together. Each goes into a folder of its own, with everything else from this environment. Whatever
transformers announces that it will remove counts as a failure, so that it is seen while there is time. Another Python:
`make test-matrix PYTHON=python3.13 VENV=.venv-3.13`.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

from environments import interpreter, try_all

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / ".matrix"
RELEASES = ("transformers==5.16.1", "transformers==5.24.0", "torch==2.14.1,transformers==5.24.0")
TESTS = ("tests/unit/checkpoint", "tests/unit/scoring", "tests/unit/evaluate", "tests/integration")
VERSIONS = "import torch, transformers; print(f'torch {torch.__version__}, transformers {transformers.__version__}')"


def try_releases(requirements: str) -> tuple[bool, str]:
    """Whether the tests of scoring and evaluation pass with requirements, and what ran in words."""
    name = requirements.replace("==", "-").replace(",", "-")
    python = interpreter(FOLDER / name, *requirements.split(","), dependencies=True)
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    versions = subprocess.run([python, "-c", VERSIONS], env=env, capture_output=True, text=True, check=True)  # noqa: S603
    log = FOLDER / f"{name}.log"
    with log.open("w") as out:
        command = [python, "-m", "pytest", *TESTS, "-q", "-p", "no:cacheprovider", "-n", "2", "--dist", "loadfile"]
        run = subprocess.run(  # noqa: S603
            [*command, "-W", "error::FutureWarning"], cwd=ROOT, env=env, stdout=out, stderr=out, check=False
        )
    summary = log.read_text(errors="replace").strip().splitlines()[-1].strip("= ")
    found = f"Python {platform.python_version()}, {versions.stdout.strip()}"
    return run.returncode == 0, f"{found}: {summary} ({log.relative_to(ROOT)})"


if __name__ == "__main__":
    try_all(sys.argv[1:] or RELEASES, try_releases)
