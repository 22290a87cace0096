"""Environments of other releases, which take from this environment whatever they do not name."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import venv
from collections.abc import Callable, Sequence
from pathlib import Path


def interpreter(folder: Path, *requirements: str, dependencies: bool = False) -> Path:
    """Python of an environment in ``folder`` with pinned ``requirements``, made where it is missing or incomplete.

    Packages that the requirements do not name come from the environment that this runs in, at the release that is
    there; with ``dependencies`` those that a requirement wants newer or that are missing are installed too.
    """
    python = folder / "bin" / "python"
    if not (folder / "complete").exists():
        venv.create(folder, with_pip=True, clear=True)
        site = next(folder.glob("lib/python*/site-packages"))
        (site / "rest.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
        command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        command += [] if dependencies else ["--no-deps"]
        subprocess.run([*command, *requirements], check=True)  # noqa: S603
        (folder / "complete").touch()
    return python


def try_all(releases: Sequence[str], attempt: Callable[[str], tuple[bool, str]]) -> None:
    """Print what became of each release, and exit: with 1 where one of them is not well."""
    failed = False
    for release in releases:
        good, words = attempt(release)
        print(f"{'ok ' if good else 'bad'} {words}", flush=True)
        failed |= not good
    sys.exit(failed)
