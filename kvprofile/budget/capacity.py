"""What fits into a GPU: cache bytes, requests in flight and the bound on speed, counted from a model's config alone.

Nothing is measured and no weights are read. Numbers that the inputs do not determine are null, and every choice made
on the way is a ``Decision`` with its reason. Sizes are bytes; GiB is 2**30 bytes, GB is 10**9.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from kvprofile.budget import store
from kvprofile.budget.allocate import Constraints, effective_retention, full_head_count, full_places
from kvprofile.budget.choice import choose, default_kind, has_scores, require_kind
from kvprofile.budget.dtypes import CACHE_DTYPE_NAMES, CACHE_DTYPES
from kvprofile.budget.model_cache import LayerCache
from kvprofile.budget.model_shape import Decision, ModelShape
from kvprofile.budget.profile import FULL_ATTENTION, NO_CACHE, PRESETS, SLIDING_ATTENTION, Geometry, Profile
from kvprofile.budget.trim import GRADED, WHOLE
from kvprofile.errors import InputError
from kvprofile.sizes import MAX_BYTES, parse_size

DEFAULT_RETENTIONS = (1.0, *PRESETS)
DEFAULT_MEMORY_UTILIZATION = 0.9
"""Share of a GPU's memory given to vLLM (``gpu_memory_utilization``); its own default is 0.92 in 0.32, 0.9 before."""

MAX_CONTEXT_TOKENS = 10**12
"""Bound on what is asked for: far above any model, far below where floats overflow."""

GPUS: dict[str, dict[int, int]] = {
    "A10": {24: 23028},
    "A100": {40: 40960, 80: 81920},
    "B200": {192: 183359},
    "H100": {80: 81559},
    "H200": {141: 143771},
    "L4": {24: 23034},
    "L40S": {48: 46068},
    "MI300X": {192: 196592},
    "RTX 3090": {24: 24576},
    "RTX 4090": {24: 24564},
    "RTX 5090": {32: 32607},
    "T4": {16: 15360},
    "V100": {16: 16160, 32: 32510},
}
"""Name -> {GB in the name it is sold under: MiB that nvidia-smi (rocm-smi for the MI300X) reports as its total}.

The totals are the drivers' own, ECC as shipped, as seen in public bug reports and cloud documentation; they differ
from the sold GB both ways (an A100 80GB has 80 GiB, an L4 24GB has 22.5 GiB). CUDA itself sees about 1 % less.
"""


@dataclass(frozen=True)
class GpuMemory:
    """Memory of one GPU in bytes, its name if it was given by name, and where the size comes from."""

    name: str | None
    memory_bytes: int
    reason: str


@dataclass(frozen=True)
class CapacityAtRetention:
    """One retention. Bytes are those of one request of the planned context on one GPU.

    ``requests`` decode at once when nothing prefills; ``requests_beside_prefill`` counts one that does: it holds the
    whole cache of its prompt until it starts to decode. ``speed_bound`` is what a memory-bound decode step can gain
    over the full cache: the ratio of cache bytes read, 1 / (r + (1 - r) * (S + W + o) / n) where no layer slides and o
    of the n tokens are output.
    """

    retention: float
    full_heads: int | None
    retention_realised: float
    effective_retention: float
    kv_bytes_read_per_step_per_gpu: int
    requests: int | None
    requests_beside_prefill: int | None
    speed_bound: float


@dataclass(frozen=True)
class Capacity:
    """Everything ``kvprofile plan`` prints; null is unknown. ``kv_bytes_per_token`` counts every layer, all GPUs."""

    model: str
    geometry: Geometry
    context_tokens: int
    output_tokens: int
    sink_tokens: int
    recent_tokens: int
    sliding_window_tokens: int | None
    dtype: str
    tensor_parallel_size: int
    gpu: str | None
    gpu_memory_bytes: int
    memory_utilization: float
    weight_bytes: int | None
    weight_bytes_per_gpu: int | None
    cache_bytes_per_gpu: int | None
    kv_bytes_per_token: int
    kv_bytes_per_token_per_gpu: int
    kind: str
    at: tuple[CapacityAtRetention, ...]
    decisions: tuple[Decision, ...]


def plan(
    shape: ModelShape,
    gpu: GpuMemory,
    context_tokens: int,
    *,
    output_tokens: int = 0,
    retentions: Sequence[float] = (),
    tensor_parallel_size: int = 1,
    dtype: str | None = None,
    weight_bytes: int | None = None,
    memory_utilization: float = DEFAULT_MEMORY_UTILIZATION,
    kind: str | None = None,
) -> Capacity:
    """Count what fits. ``dtype`` is the cache's, ``weight_bytes`` those of all GPUs together; null takes the model's.

    ``output_tokens`` of the context are output, which trimmed heads keep. ``kind`` of heads is that of the budget file
    unless given, as vLLM serves it, and whole without a file.

    Without ``retentions`` those of a budget file without scores are taken, else DEFAULT_RETENTIONS. Raises InputError
    for a context, size or share that makes no sense, ranks that the heads cannot be dealt to, or a retention that a
    budget file without scores does not state.
    """
    geometry = shape.geometry
    if not 1 <= context_tokens <= MAX_CONTEXT_TOKENS:
        raise InputError(f"context of {context_tokens} tokens; give 1 to {MAX_CONTEXT_TOKENS}")
    if not 0.0 < memory_utilization <= 1.0:
        raise InputError(f"memory utilization {memory_utilization:g} is outside (0, 1]; give a share like 0.9")
    if kind is None:
        kind = WHOLE if shape.profile is None else default_kind(shape.profile)
    if require_kind(kind) == GRADED and shape.profile is None:
        raise InputError(
            "graded heads are counted from a budget file with a probe, "
            f"and no {store.default_path(shape.name)} is there; give one as MODEL, or leave out --kind"
        )
    holders = _holders(shape, tensor_parallel_size)
    cache_dtype, dtype_decision = _cache_dtype(dtype, shape)
    weights, weight_decision = _weights(weight_bytes, shape)
    weights_per_gpu = None if weights is None else math.ceil(weights / tensor_parallel_size)
    pool = None if weights_per_gpu is None else math.floor(gpu.memory_bytes * memory_utilization) - weights_per_gpu
    value_bytes = CACHE_DTYPES[cache_dtype]
    per_token = kv_bytes_per_token(shape.layers, value_bytes)
    wanted = sorted({1.0, *(retentions or _default_retentions(shape))}, reverse=True)
    rows = tuple(
        _row(shape, retention, (context_tokens, output_tokens), holders, value_bytes, pool, kind)
        for retention in wanted
    )
    decisions = [
        *shape.decisions,
        dtype_decision,
        weight_decision,
        Decision("gpu memory", f"{gpu.memory_bytes / 2**30:.1f} GiB", gpu.reason),
        *_warnings(shape, context_tokens, tensor_parallel_size, cache_dtype),
        *_kind_decisions(shape.profile, wanted, holders, kind),
    ]
    return Capacity(
        model=shape.name,
        geometry=geometry,
        context_tokens=context_tokens,
        output_tokens=output_tokens,
        sink_tokens=shape.sink_tokens,
        recent_tokens=shape.recent_tokens,
        sliding_window_tokens=shape.window_tokens,
        dtype=cache_dtype,
        tensor_parallel_size=tensor_parallel_size,
        gpu=gpu.name,
        gpu_memory_bytes=gpu.memory_bytes,
        memory_utilization=memory_utilization,
        weight_bytes=weights,
        weight_bytes_per_gpu=weights_per_gpu,
        cache_bytes_per_gpu=pool,
        kv_bytes_per_token=per_token * tensor_parallel_size // holders,
        kv_bytes_per_token_per_gpu=per_token // holders,
        kind=kind,
        at=rows,
        decisions=tuple(decisions),
    )


def kv_bytes_per_token(layers: Iterable[LayerCache], dtype_bytes: float) -> int:
    """Bytes stored for one token: a key and a value in every layer and KV head, each once."""
    return round(sum(layer.values for layer in layers) * dtype_bytes)


def kv_bytes_read_per_step(shape: ModelShape, effective: float, context_tokens: int, dtype_bytes: float) -> int:
    """Cache bytes that a decode step of one request reads, which are those the request holds: each once.

    ``effective`` is the share of the full-attention layers' cache that is kept, sinks and window counted
    (``effective_retention``). Sliding layers hold their window whatever the retention.
    """
    full, sliding = (
        kv_bytes_per_token([layer for layer in shape.layers if layer.kind == kind], dtype_bytes)
        for kind in (FULL_ATTENTION, SLIDING_ATTENTION)
    )
    window = context_tokens if shape.window_tokens is None else min(context_tokens, shape.window_tokens)
    return round(full * context_tokens * effective) + sliding * window


def parse_gpu_memory(text: str) -> GpuMemory:
    """'24GiB', '80 GB', 'H100', 'A100-80GB', 'NVIDIA GeForce RTX 4090' -> memory of one GPU. Raises InputError."""
    size = parse_size(text)
    if size is not None and size > MAX_BYTES:
        raise InputError("--gpu-memory is more than 1 EiB, which no GPU has")
    if size is not None and size >= 1.0:
        return GpuMemory(None, int(size), "asked for")
    words = re.sub(r"[\s_-]+", " ", text.upper()).strip()
    words = re.sub(r"\b(NVIDIA|AMD|GEFORCE|TESLA|INSTINCT|SXM\d?|PCIE|HBM\w*)\b ?", "", words).strip()
    for name, sizes in GPUS.items():
        short = name.removeprefix("RTX ")
        found = re.fullmatch(rf"(?:RTX ?)?{short}(?: (\d{{1,6}}) ?G?I?B?)?", words)
        if not found:
            continue
        sold = int(found[1]) if found[1] else next(iter(sizes))
        if sold not in sizes or (not found[1] and len(sizes) > 1):
            options = " or ".join(f"{name} {size}GB" for size in sizes)
            raise InputError(f"which {text.strip()} is not clear; give {options}")
        reason = f"the driver's total for {name} {sold}GB, {sizes[sold]} MiB"
        return GpuMemory(f"{name} {sold}GB", sizes[sold] * 2**20, reason)
    raise InputError(
        f"GPU memory {text[:60]!r} is neither a size with a unit (24GiB, 80GB) nor a known GPU ({', '.join(GPUS)})"
    )


def _row(
    shape: ModelShape,
    retention: float,
    tokens: tuple[int, int],
    holders: int,
    dtype_bytes: float,
    pool: int | None,
    kind: str,
) -> CapacityAtRetention:
    """One retention, for requests of ``tokens`` (all of them, those of the output)."""
    context_tokens, output_tokens = tokens
    heads = len(shape.geometry.profiled_layers) * shape.geometry.kv_heads
    if shape.profile is not None and retention < 1.0:
        choice = choose(shape.profile, retention, Constraints(tensor_parallel_size=holders), kind=kind)
        full_heads = None if choice.kind == GRADED else len(full_places(choice.heads))
        realised = choice.retention_realised
    else:
        # every rank holds equally many full heads of a layer, so full heads come in multiples of the ranks
        full_heads = full_head_count(retention, heads // holders) * holders
        realised = full_heads / heads
    effective = effective_retention(realised, shape.sink_tokens, shape.recent_tokens, context_tokens, output_tokens)
    whole = kv_bytes_read_per_step(shape, 1.0, context_tokens, dtype_bytes)
    held = kv_bytes_read_per_step(shape, effective, context_tokens, dtype_bytes)
    on_gpu, whole_on_gpu = math.ceil(held / holders), math.ceil(whole / holders)
    requests = beside_prefill = None
    if pool is not None:
        requests = max(0, pool // on_gpu)
        beside_prefill = 1 + (pool - whole_on_gpu) // on_gpu if pool >= whole_on_gpu else 0
    return CapacityAtRetention(
        retention=retention,
        full_heads=full_heads,
        retention_realised=realised,
        effective_retention=effective,
        kv_bytes_read_per_step_per_gpu=on_gpu,
        requests=requests,
        requests_beside_prefill=beside_prefill,
        speed_bound=whole / held,
    )


def _default_retentions(shape: ModelShape) -> Sequence[float]:
    if shape.profile is None or has_scores(shape.profile):
        return DEFAULT_RETENTIONS
    return [float(key) for key in shape.profile.budgets]


def _kind_decisions(
    profile: Profile | None, retentions: Sequence[float], holders: int, kind: str
) -> Iterator[Decision]:
    """Which of a file's kinds of heads is counted, and rows whose fractions no runtime can serve."""
    if profile is not None and profile.probe is not None:
        why = "the file has a probe" if kind == GRADED else "asked for; vLLM serves the same with LLM_KVZIP_KIND=whole"
        yield Decision("kind", kind, why)
    if kind == GRADED:
        return
    for retention in retentions:
        if profile is None or retention == 1.0:
            continue
        constraints = Constraints(tensor_parallel_size=holders)
        if choose(profile, retention, constraints, kind=kind).first_fraction is not None:
            why = f"the file holds fractions of heads at retention {retention:g}; only whole heads can be served"
            yield Decision("row counted, not servable", f"{retention:g}", why)


def _holders(shape: ModelShape, size: int) -> int:
    """Ranks that hold different KV heads: min(t, G), as beyond G ranks vLLM replicates heads.

    Where layers differ in G, sizes are counted that all of them have heads for.
    """
    geometry = shape.geometry
    heads, kv_heads = geometry.attention_heads, geometry.kv_heads
    if size < 1 or heads % size or (kv_heads % size and size % kv_heads):
        raise InputError(
            f"tensor-parallel size {size} does not deal {heads} query and {kv_heads} KV heads evenly; "
            f"give one of {', '.join(str(t) for t in range(1, heads + 1) if _deals(geometry, t))}"
        )
    counts = {layer.kv_heads for layer in shape.layers if layer.kind != NO_CACHE}
    if len(counts) > 1 and any(count % size for count in counts):
        raise InputError(
            f"layers have {' and '.join(map(str, sorted(counts)))} KV heads, and tensor-parallel size {size} would "
            "replicate some of them only; give a size that divides all"
        )
    return min(size, kv_heads)


def _deals(geometry: Geometry, size: int) -> bool:
    return geometry.attention_heads % size == 0 and (geometry.kv_heads % size == 0 or size % geometry.kv_heads == 0)


def _cache_dtype(asked: str | None, shape: ModelShape) -> tuple[str, Decision]:
    if asked is None and shape.cache_dtype is not None:
        reason = "the checkpoint's quantisation asks for it, which vLLM follows"
        return shape.cache_dtype, Decision("cache dtype", shape.cache_dtype, reason)
    if asked is None and shape.dtype not in CACHE_DTYPES:
        known = "not known" if shape.dtype is None else f"{shape.dtype}, no dtype of a cache"
        return "bfloat16", Decision("cache dtype", "bfloat16", f"assumed: the model's dtype is {known}; give --dtype")
    name = asked or shape.dtype or ""
    known = CACHE_DTYPE_NAMES.get(name.lower(), name.lower())
    if known not in CACHE_DTYPES:
        choices = ", ".join([*CACHE_DTYPES, "bf16", "fp16", "fp32"])
        raise InputError(f"unknown cache dtype {name!r}; give --dtype {choices}")
    return known, Decision("cache dtype", known, "asked for" if asked else "the config's dtype")


def _weights(asked: int | None, shape: ModelShape) -> tuple[int | None, Decision]:
    size, reason = (asked, "asked for") if asked is not None else (shape.weight_bytes, shape.weight_reason)
    return size, Decision("weights", "unknown" if size is None else f"{size / 2**30:.2f} GiB", reason)


def _warnings(shape: ModelShape, context_tokens: int, tensor_parallel_size: int, dtype: str) -> list[Decision]:
    kv_heads = shape.geometry.kv_heads
    found = [Decision("not counted", "activations", "nor CUDA graphs, nor blocks filled in part: vLLM fits a bit less")]
    if tensor_parallel_size > 1:
        found.append(Decision("weights per gpu", f"1/{tensor_parallel_size}", "as if all were split; norms are not"))
    if tensor_parallel_size > kv_heads:
        reason = f"{tensor_parallel_size} ranks share {kv_heads} KV heads, so all heads of a layer keep equally much"
        found.append(Decision("KV heads", f"replicated x{tensor_parallel_size // kv_heads}", reason))
    if shape.max_positions is not None and context_tokens > shape.max_positions:
        reason = f"longer than the {shape.max_positions} positions in the config"
        found.append(Decision("context", str(context_tokens), reason))
    if dtype == "nvfp4":
        found.append(Decision(f"{dtype} cache", "refused", "kvprofile's runtime trims 8-, 16- and 32-bit caches only"))
    return found
