"""The other engine: stock vLLM, its own loaders, kernels and executors, so that what is profiled is what is served.

vLLM is imported when an engine is placed or started. How scores are taken there: ``scoring.in_vllm``; why it is done
this way: docs/decisions/2026-11-24-scoring-in-vllm.md.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kvprofile.budget.dtypes import MODEL_DTYPES
from kvprofile.capture import ENGINE_ARGUMENTS, SCHEDULER, refuse
from kvprofile.capture.session import Session
from kvprofile.checkpoint import Description
from kvprofile.environment import ENABLED
from kvprofile.errors import InputError, first_line
from kvprofile.progress import Progress
from kvprofile.scoring import vllm_argument
from kvprofile.scoring.chunk_store import ChunkStore
from kvprofile.scoring.plan import ScoringPlan
from kvprofile.scoring.prompts import Chunk
from kvprofile.scoring.reconstruction import forward_tokens
from kvprofile.scoring.session_scorer import SessionScorer

_OURS = {
    "model",
    "dtype",
    "max_model_len",
    "max_num_seqs",
    "enable_prefix_caching",
    "tensor_parallel_size",
    "pipeline_parallel_size",
    "tokenizer",
}
_OURS |= {"worker_extension_cls", "scheduler_cls", "async_scheduling", "skip_tokenizer_init", "trust_remote_code"}

_ENVIRONMENT = {
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
}
"""Unless set otherwise: results have stdout to themselves, and the engine core needs no process of its own here."""


@dataclass(frozen=True)
class VllmEngine:
    """A vLLM engine to be started with ``arguments`` (of ``vllm.LLM``), each choice with its reason."""

    dtype: str
    device: str
    version: str
    arguments: Mapping[str, Any]
    reasons: tuple[str, ...]
    name = "vllm"

    def facts(self) -> dict[str, object]:
        """What scores depend on besides the plan."""
        told = {key: value for key, value in self.arguments.items() if key != "model"}
        return {"engine": self.name, "vllm": self.version, "device": self.device, "arguments": told}

    def score(self, plan: ScoringPlan, store: ChunkStore, progress: Progress, keep_token_scores: bool) -> str:
        """Score what is not finished yet; returns the attention kernel used. Raises InputError where vLLM cannot."""
        chunk_tokens, geometry = plan.options.chunk_tokens, plan.description.geometry
        work = [forward_tokens(plan.documents[i], plan.frame, chunk_tokens, store.finished(i)) for i in plan.own]
        with started(self.arguments) as llm, watching_workers(llm), Session(llm) as session:
            if session.layers != geometry.profiled_layers or session.kv_heads != geometry.kv_heads:
                raise InputError(
                    f"vLLM has full attention in layers {_listed(session.layers)} with {session.kv_heads} KV heads, "
                    f"the config says layers {_listed(geometry.profiled_layers)} with {geometry.kv_heads}"
                )
            progress.start(sum(work))
            scorer = SessionScorer(session, plan.frame, chunk_tokens=chunk_tokens, advance=progress.advance)
            shared = False
            for index in plan.own:

                def middle(chunk: Chunk, index: int = index) -> slice:
                    return plan.middle(index, chunk.start, chunk.stop)

                for scored in scorer.score(plan.documents[index], f"document-{index}", store.finished(index), middle):
                    between = middle(scored.chunk)
                    shared = shared or (scored.sums is None and between.start < between.stop)
                    store.save(index, scored.chunk.index, scored.token_scores, keep_token_scores, between, scored.sums)
            if plan.has_middle and shared:
                progress.say("several ranks share each KV head, so there are no graded budgets, and no probe")
            if scorer.evictions:
                progress.say(f"the context fell out of vLLM's cache {scorer.evictions} times and was read again")
            return self._kernel(session)

    def _kernel(self, session: Session) -> str:
        untested = sorted({*session.backends} - {*refuse.TESTED_BACKENDS})
        note = f"; {', '.join(untested)} found by its own writes, not in the tested list" if untested else ""
        return f"{', '.join(session.backends)} of vLLM {self.version}, blocks of {session.block_tokens} tokens{note}"


def place_in_vllm(
    description: Description,
    dtype: str,
    device: str,
    positions: int,
    tensor_parallel_size: int = 1,
    others: Sequence[str] = (),
    pipeline_parallel_size: int = 1,
) -> VllmEngine:
    """Choose the engine's arguments; ``others`` are the user's, as NAME=VALUE. Imports vLLM, starts nothing.

    ``positions`` are those that the longest request reaches. Raises InputError for what cannot be done here.
    """
    with _environment():
        import vllm
        from vllm.platforms import current_platform

    platform = current_platform.device_type
    if device not in ("auto", platform):
        raise InputError(f"--device {device}: vLLM serves on {platform} here; leave out --device")
    if dtype not in ("auto", *MODEL_DTYPES):
        raise InputError(f"unknown dtype {dtype!r}; use one of auto, {', '.join(MODEL_DTYPES)}")
    own = str(getattr(description.config, "dtype", None) or "bfloat16").removeprefix("torch.")
    chosen = dtype if dtype != "auto" else own if own in MODEL_DTYPES else "bfloat16"
    if positions + 1 > description.max_positions:
        raise InputError(
            f"the longest repeat reaches position {positions} and vLLM needs one more, but "
            f"{description.position_reason}; pass a smaller --context-tokens or --chunk-tokens"
        )
    for kind, size in (("tensor", tensor_parallel_size), ("pipeline", pipeline_parallel_size)):
        if size < 1:
            raise InputError(f"--{kind}-parallel-size must be at least 1, not {size}")
    if pipeline_parallel_size > description.geometry.layers:
        raise InputError(
            f"--pipeline-parallel-size {pipeline_parallel_size}: the model has {description.geometry.layers} layers"
        )
    asked = dict(vllm_argument.parse(text, _OURS, "block_size=64") for text in others)
    ranks = min(tensor_parallel_size, description.geometry.kv_heads)
    cache_bytes = description.geometry.values_per_token * (positions + _ROOM_TOKENS) * MODEL_DTYPES[chosen] // ranks
    arguments: dict[str, Any] = {
        "model": str(description.source.folder),
        "skip_tokenizer_init": True,
        "trust_remote_code": description.trust_remote_code,
        "dtype": chosen,
        "max_model_len": positions + 1,
        "max_num_seqs": 1,
        "enforce_eager": True,
        "enable_prefix_caching": True,
        "tensor_parallel_size": tensor_parallel_size,
        "kv_cache_memory_bytes": cache_bytes,
        "use_tqdm_on_load": False,
        "scheduler_cls": SCHEDULER,
        "async_scheduling": False,
        **ENGINE_ARGUMENTS,
        **asked,
    }
    reasons = [
        f"vLLM {vllm.__version__} on {platform}" + ("" if _tested(vllm.__version__) else ", a release not tested with"),
        f"dtype {chosen}: " + ("asked for" if dtype != "auto" else "the checkpoint's own, as it is served"),
    ]
    if pipeline_parallel_size > 1:
        arguments["pipeline_parallel_size"] = pipeline_parallel_size
        reasons.append(f"pipeline parallel over {pipeline_parallel_size} stages: asked for")
    if tensor_parallel_size > 1:
        reasons.append(f"tensor parallel over {tensor_parallel_size} ranks: asked for")
    return VllmEngine(chosen, platform, vllm.__version__, arguments, tuple(reasons))


_ROOM_TOKENS = 512
"""Blocks filled in part, and vLLM's own null block."""


@contextlib.contextmanager
def started(arguments: Mapping[str, Any]) -> Iterator[Any]:
    """A running ``vllm.LLM``, shut down at the end. Raises InputError where vLLM refuses, or kvprofile does.

    What cannot be captured is found from the configuration, before weights load.
    """
    with _environment(), _stdout_to_stderr(), _threads():
        from vllm import LLM
        from vllm.distributed import cleanup_dist_env_and_memory
        from vllm.engine.arg_utils import EngineArgs
        from vllm.usage.usage_lib import UsageContext

        try:
            config = EngineArgs(**arguments).create_engine_config(UsageContext.LLM_CLASS)
        except Exception as error:  # vLLM validates with whatever is at hand
            raise InputError(f"vLLM does not take this model so: {_reason(error)}") from error
        told = refuse.problems(config)
        if told:
            raise InputError(f"kvprofile does not score with {'; '.join(told)}")
        try:
            llm = LLM(**arguments)
        except Exception as error:  # loaders and kernels fail in their own ways
            raise InputError(f"vLLM does not start: {_reason(error)}") from error
        try:
            yield llm
        finally:
            llm.llm_engine.engine_core.shutdown()
            del llm
            cleanup_dist_env_and_memory()


@contextlib.contextmanager
def watching_workers(llm: Any) -> Iterator[None]:
    """Say in one line that a worker of vLLM ended, whatever vLLM's own errors are. Raises InputError for that."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        if _worker_ended(llm, error):
            raise InputError(
                "a worker of vLLM ended while scoring (out of memory, or stopped by somebody); "
                "finished chunks are kept, run the same command again to continue"
            ) from error
        raise


_NOTICED_S = 3.0
"""How long vLLM may take to notice that a process is gone, after another one of its ranks has failed for that."""


def _worker_ended(llm: Any, error: Exception) -> bool:
    from vllm.v1.engine.exceptions import EngineDeadError

    if isinstance(error, EngineDeadError):  # the engine's core is a process of its own
        return True
    core = getattr(llm.llm_engine.engine_core, "engine_core", None)
    executor: Any = getattr(core, "model_executor", None)
    if not hasattr(executor, "is_failed"):
        return False
    deadline = time.monotonic() + _NOTICED_S
    while not executor.is_failed and time.monotonic() < deadline:
        time.sleep(0.05)
    return bool(executor.is_failed)


def _tested(version: str) -> bool:
    return version.partition("+")[0] in refuse.TESTED_VERSIONS


def _listed(layers: Sequence[int]) -> str:
    return ", ".join(map(str, layers)) or "none"


def _reason(error: Exception) -> str:
    """The line that says something: validators put theirs after a heading."""
    listed = getattr(error, "errors", None)
    if callable(listed):
        with contextlib.suppress(Exception):
            return str(listed()[0]["msg"]).removeprefix("Value error, ").splitlines()[0]
    return first_line(error)


@contextlib.contextmanager
def _environment() -> Iterator[None]:
    """The variables that vLLM reads, taken back afterwards, and none of its deprecation warnings.

    Budgets are off, whatever a serving shell has set: heads are profiled with their whole cache.
    """
    before = dict(os.environ)
    os.environ.update({**_ENVIRONMENT, **before, ENABLED: "0"})
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        for name in (*_ENVIRONMENT, ENABLED):
            if name in before:
                os.environ[name] = before[name]
            else:
                os.environ.pop(name, None)


@contextlib.contextmanager
def _threads() -> Iterator[None]:
    """Put back what a CPU worker of vLLM changes in this process: its cores, and torch.set_num_threads."""
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    setter = torch.set_num_threads
    try:
        yield
    finally:
        torch.set_num_threads = setter
        if cores is not None:
            os.sched_setaffinity(0, cores)


@contextlib.contextmanager
def _stdout_to_stderr() -> Iterator[None]:
    """Libraries below vLLM print to the process's stdout, which belongs to results."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)
