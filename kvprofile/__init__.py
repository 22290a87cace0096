"""kvprofile: per-KV-head budgets for language models, profiled once and applied by vLLM."""

__version__ = "0.1.0"
