"""Model runner V2 on a CPU: Triton's interpreter runs its kernels in Python. Import :func:`enable` before vLLM.

vLLM takes V2 where it finds Triton, which has no backend for CPUs. So Triton is told of one that compiles nothing, and
is asked for what vLLM wants to know of a device.
"""

from __future__ import annotations

import importlib.util
import os
from types import SimpleNamespace

WANTED = "MODEL_RUNNER_V2"
"""Of the environment: an engine of this process runs on V2."""

MISSING = "Triton, whose interpreter runs model runner V2, is not installed"


def is_here():
    return importlib.util.find_spec("triton") is not None


class _Driver:
    """A device named cpu."""

    @staticmethod
    def is_active():
        return True

    def get_current_device(self):
        return 0

    def get_active_torch_device(self):
        import torch

        return torch.device("cpu")

    def get_device_interface(self):
        import torch

        return torch.cpu

    def get_current_stream(self, _device=None):
        return 0

    def get_current_target(self):
        return SimpleNamespace(backend="cpu", arch="cpu", warp_size=1)

    def get_device_capability(self, *_):
        return (0, 0)


def enable():
    """From here on vLLM of this process finds Triton, interprets its kernels and takes model runner V2."""
    os.environ["TRITON_INTERPRET"] = "1"
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1"
    import triton.backends
    from triton.runtime.driver import driver

    triton.backends.backends["cpu"] = triton.backends.Backend(compiler=None, driver=_Driver)
    driver._default = _Driver()
