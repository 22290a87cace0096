"""Small file systems that tests fill."""

from __future__ import annotations

import os
import shutil
import subprocess

import pytest


def disks(tmp_path):
    """A small file system of its own. Gives its folder and a function that mounts it with other options."""
    place = tmp_path / "disk"
    place.mkdir()

    def mount(*words):
        done = subprocess.run(["mount", *words, str(place)], capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")

    if shutil.which("mount") is None or os.geteuid() != 0:
        pytest.skip("mounting needs root")
    mount("-t", "tmpfs", "-o", "size=1m", "tmpfs")
    yield place, mount
    subprocess.run(["umount", "--lazy", str(place)], check=True)


def fill(place, left=0):
    with open(place / "ballast", "wb", buffering=0) as ballast:
        try:
            while True:
                ballast.write(b"\0" * 4096)
        except OSError:
            ballast.truncate(max(0, ballast.tell() - left))
