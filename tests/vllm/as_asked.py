"""What vLLM's CPU platform overrules because it has no use for it, and here takes as it was asked for.

That is an attention backend by name, whose kernels Triton interprets (``interpreter``), and async scheduling, which
GPUs have on unless told otherwise.
"""

from __future__ import annotations

WANTED = "AS_ASKED"
"""Of the environment: engines of this process get what their arguments name."""


def enable():
    """Let arguments decide on attention backend and scheduler."""
    import torch
    from vllm.platforms.cpu import CpuPlatform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    choose, check = CpuPlatform.get_attn_backend_cls.__func__, CpuPlatform.check_and_update_config.__func__

    def get_attn_backend_cls(cls, selected_backend, *args, **kwargs):
        if selected_backend not in (None, AttentionBackendEnum.CPU_ATTN):
            return selected_backend.get_path()
        return choose(cls, selected_backend, *args, **kwargs)

    def check_and_update_config(cls, vllm_config):
        wanted = vllm_config.scheduler_config.async_scheduling
        check(cls, vllm_config)
        vllm_config.scheduler_config.async_scheduling = wanted or False

    CpuPlatform.get_attn_backend_cls = classmethod(get_attn_backend_cls)
    CpuPlatform.check_and_update_config = classmethod(check_and_update_config)
    torch.cuda.get_device_capability = lambda *_: (9, 0)  # TRITON_ATTN's cache write asks
