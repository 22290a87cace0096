"""Environments of other releases, beside everything else that this environment has."""

from __future__ import annotations

import subprocess
import sysconfig
import venv
from pathlib import Path


def interpreter(folder: Path, *requirements: str) -> Path:
    """Python of an environment in ``folder`` with pinned ``requirements``, made where it is missing or incomplete.

    Whatever they need and the requirements do not name comes from the environment that this runs in.
    """
    python = folder / "bin" / "python"
    if not (folder / "complete").exists():
        venv.create(folder, with_pip=True, clear=True)
        site = next(folder.glob("lib/python*/site-packages"))
        (site / "rest.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
        command = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
        subprocess.run([*command, *requirements], check=True)  # noqa: S603
        (folder / "complete").touch()
    return python
