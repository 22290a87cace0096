"""Per-KV-head budgets inside stock vLLM: heads that do not need the whole context give their memory back.

vLLM loads ``gate`` in each of its processes. Without ``LLM_KVZIP_ENABLED=1`` that is all that happens. ``settings``,
``find``, ``budget`` and ``packing`` know nothing of vLLM; the other modules subclass or wrap it and are imported by
the gate alone. PATCHES.md lists every vLLM function touched.

Semantics, which ``kvprofile.evaluate.simulate`` implements too: prefill is full attention for every head. When vLLM
admits a request, or admits it again after preemption, its ``prefill_end`` is its number of tokens then. Once all tokens
below it are processed, trimmed heads see sinks and window only (``kvprofile.budget.trim``) and their other
blocks go back to the pool. After a preemption generated tokens are prefilled in full like the prompt, so outputs may
differ from those of an undisturbed run.
"""
