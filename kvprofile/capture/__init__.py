"""Looking into vLLM while it prefills: token scores of marked requests, and what their keys and values are like.

Nothing of vLLM is replaced for good. An engine that is started with ``ENGINE_ARGUMENTS`` carries a worker extension,
which does nothing until a ``session.Session`` opens; from then to its end it watches the attention layers of each
worker, whatever processes those live in, and what it found leaves them by vLLM's own RPC. ``marks``, ``rows``,
``layout``, ``watch``, ``worker`` and ``scheduler`` run inside vLLM's processes and import torch and vLLM alone;
``session``, ``merge`` and ``refuse`` run where the engine was started. Importing any of them changes nothing.
"""

WORKER = "kvprofile.capture.worker.CaptureWorker"
SCHEDULER = "kvprofile.capture.scheduler.CaptureScheduler"

ENGINE_ARGUMENTS = {"worker_extension_cls": WORKER}
"""What ``vllm.LLM`` needs in addition to its usual arguments so that a session can open on it."""
