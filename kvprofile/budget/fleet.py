"""What several replicas of one server hold and do at most, from the plan of one of them (``capacity``).

A bound, not a forecast: decode steps are counted as if they did nothing but read weights and caches at the data sheet's
speed, with every pool full. Numbers that the inputs do not determine are null.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvprofile.budget.capacity import Capacity
from kvprofile.budget.model_shape import Decision
from kvprofile.errors import InputError
from kvprofile.sizes import MAX_BYTES, parse_size

MAX_REPLICAS = 1_000_000

BANDWIDTHS: dict[str, int] = {
    "A10 24GB": 600,
    "A100 40GB": 1555,
    "A100 80GB": 2039,
    "B200 192GB": 8000,
    "H100 80GB": 3350,
    "H200 141GB": 4800,
    "L4 24GB": 300,
    "L40S 48GB": 864,
    "MI300X 192GB": 5300,
    "RTX 3090 24GB": 936,
    "RTX 4090 24GB": 1008,
    "RTX 5090 32GB": 1792,
    "T4 16GB": 320,
    "V100 16GB": 900,
    "V100 32GB": 900,
}
"""GB/s of a GPU's memory by its makers' data sheets, of the SXM model where there are several."""

ACTIVATION_BYTES = 2
"""Of a number that ranks exchange: 16-bit models, whatever the cache's dtype."""


@dataclass(frozen=True)
class FleetAtRetention:
    """All replicas at one retention, with pools full of decoding requests.

    ``tokens_per_second`` is what reading weights and caches allows. ``exchanged_bytes_per_second_per_gpu`` is what each
    GPU sends to the others of its replica then.
    """

    retention: float
    requests: int | None
    tokens_per_second: float | None
    exchanged_bytes_per_second_per_gpu: float | None


@dataclass(frozen=True)
class Fleet:
    """What ``kvprofile plan --replicas`` adds; null is unknown.

    ``exchanged_bytes_per_token_per_gpu`` is sent by each GPU for every token, of a prompt or of an answer: two
    all-reduces a layer. Replicas exchange nothing.
    """

    replicas: int
    gpus: int
    memory_bytes_per_second: int | None
    exchanged_bytes_per_token_per_gpu: int
    at: tuple[FleetAtRetention, ...]
    decisions: tuple[Decision, ...]


def fleet(plan: Capacity, replicas: int, memory_bandwidth: str | None = None) -> Fleet:
    """Count for ``replicas`` of a plan. ``memory_bandwidth`` is a size, a second's. Raises InputError."""
    if not 1 <= replicas <= MAX_REPLICAS:
        raise InputError(f"--replicas must lie between 1 and {MAX_REPLICAS:,}, not {replicas}")
    speed, decision = _bandwidth(plan, memory_bandwidth)
    geometry, ranks = plan.geometry, plan.tensor_parallel_size
    width = geometry.attention_heads * geometry.head_size
    # a ring: each rank sends its part of the vector ranks - 1 times, twice over
    exchanged = 2 * geometry.layers * width * ACTIVATION_BYTES * 2 * (ranks - 1) // ranks
    rows = []
    for at in plan.at:
        tokens = None
        if speed is not None and at.requests and plan.weight_bytes_per_gpu is not None:
            read = plan.weight_bytes_per_gpu + at.requests * at.kv_bytes_read_per_step_per_gpu
            tokens = at.requests * speed / read
        rows.append(
            FleetAtRetention(
                retention=at.retention,
                requests=None if at.requests is None else at.requests * replicas,
                tokens_per_second=None if tokens is None else tokens * replicas,
                exchanged_bytes_per_second_per_gpu=None if tokens is None else tokens * exchanged,
            )
        )
    reason = "attention heads x head size, as in most models; 16 bits a number"
    return Fleet(
        replicas=replicas,
        gpus=replicas * ranks,
        memory_bytes_per_second=speed,
        exchanged_bytes_per_token_per_gpu=exchanged,
        at=tuple(rows),
        decisions=(
            decision,
            *([Decision("width of a layer", str(width), reason)] if ranks > 1 else []),
            Decision("not counted", "compute", "nor prefills beside decoding, nor the network's own time"),
        ),
    )


def _bandwidth(plan: Capacity, asked: str | None) -> tuple[int | None, Decision]:
    if asked is not None:
        size = parse_size(asked)
        if size is None or not 1 <= size <= MAX_BYTES:
            raise InputError(f"--memory-bandwidth {asked[:60]!r} is not a size with its unit, a second's; like 3350GB")
        return int(size), Decision("memory bandwidth", f"{size / 1e9:g} GB/s", "asked for")
    known = BANDWIDTHS.get(plan.gpu or "")
    if known is None:
        return None, Decision(
            "memory bandwidth", "unknown", "give --memory-bandwidth, like 3350GB, for tokens a second"
        )
    return known * 10**9, Decision(
        "memory bandwidth", f"{known} GB/s", f"data sheet of the {plan.gpu}, SXM if it has one"
    )
