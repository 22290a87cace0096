"""FULL decode graphs of model runner V2 without a GPU: vLLM captures and replays, and a graph is its forward function.

A graph on a GPU repeats kernels on the memory that they were captured with. Here a replay calls the function that was
captured once more, with the metadata that was built for the capture, so what a step does not write into tensors that
were there at capture is stale, as on a GPU. What is particular to kernels and streams is not seen.

An engine starts as on a GPU: it measures what graphs take on a cache of few blocks, warms kernels up, then captures.
"""

from __future__ import annotations

from contextlib import contextmanager, nullcontext

WANTED = "DECODE_GRAPHS"
"""Of the environment: for how many requests each graph is, separated by commas."""

counts = {"captured": 0, "replays": 0, "padded": 0}
"""Graphs that serve, their replays, and replays with fewer requests than the graph is for."""


class Graph:
    """Stands for torch.cuda.CUDAGraph."""

    forward = None

    def replay(self):
        from vllm.config.compilation import CUDAGraphMode

        counts["replays"] += 1
        self.forward(CUDAGraphMode.NONE)


def enable(sizes):
    """From here on engines of this process on model runner V2 replay graphs of these sizes where requests decode."""
    import torch
    from vllm.platforms.cpu import CpuPlatform
    from vllm.v1.worker.gpu import cudagraph_utils, model_runner

    for name in ("synchronize", "empty_cache"):
        setattr(torch.accelerator, name, lambda *_: None)
    torch.accelerator.get_memory_info = lambda *_: (0, 0)
    CpuPlatform.graph_pool_handle = lambda _: (0, 0)
    cudagraph_utils.graph_capture = lambda **_: nullcontext()
    model_runner.lock_workspace = lambda: None
    _capture_with(torch, cudagraph_utils.CudaGraphManager)
    _start_as_on_gpus(sizes)
    prepare = model_runner.GPUModelRunner.prepare_inputs

    def prepare_inputs(self, *args, **kwargs):
        batch = prepare(self, *args, **kwargs)
        counts["padded"] += batch.num_reqs_after_padding > batch.num_reqs
        return batch

    model_runner.GPUModelRunner.prepare_inputs = prepare_inputs


def _capture_with(torch, manager):
    """Let vLLM's own loop capture, and note which forward function it captures."""
    stock, latest = manager.capture, []

    def capture(self, create_forward_fn, *args, **kwargs):
        def create(*of, **how):
            latest[:] = [create_forward_fn(*of, **how)]
            return latest[0]

        stock(self, create, *args, **kwargs)
        counts["captured"] = len(self.graphs)

    @contextmanager
    def capturing(graph, *_, **__):
        yield
        graph.forward = latest[0]

    manager.capture = capture
    torch.cuda.CUDAGraph, torch.cuda.graph = Graph, capturing


def _start_as_on_gpus(sizes):
    """Do at start what GPU workers do and CPU workers leave out."""
    from vllm.config.compilation import CUDAGraphMode
    from vllm.v1.worker.cpu_worker import CPUWorker
    from vllm.v1.worker.gpu.warmup import run_mixed_prefill_decode_warmup

    initialise, measure = CPUWorker.init_device, CPUWorker.determine_available_memory
    warm_up = CPUWorker.compile_or_warm_up_model

    def init_device(self):
        config = self.vllm_config.compilation_config
        config.cudagraph_mode = CUDAGraphMode.FULL_DECODE_ONLY
        config.cudagraph_capture_sizes, config.max_cudagraph_capture_size = list(sizes), max(sizes)
        initialise(self)

    def determine_available_memory(self):
        self.model_runner.profile_cudagraph_memory()
        return measure(self)

    def compile_or_warm_up_model(self):
        # the part of the warm-up whose kernels Triton's interpreter knows
        run_mixed_prefill_decode_warmup(self.model_runner, self.execute_model, self.sample_tokens, num_tokens=20)
        self.model_runner.capture_model()
        counts.update(replays=0, padded=0)
        return warm_up(self)

    CPUWorker.init_device, CPUWorker.determine_available_memory = init_device, determine_available_memory
    CPUWorker.compile_or_warm_up_model = compile_or_warm_up_model
