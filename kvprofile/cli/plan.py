"""``kvprofile plan``: what fits into a GPU at each retention, counted before anything is measured."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from kvprofile import checkpoint
from kvprofile.budget import capacity
from kvprofile.budget.capacity import Capacity
from kvprofile.budget.fleet import Fleet, fleet
from kvprofile.budget.model_shape import Decision, ModelShape, find_shape, with_budgets
from kvprofile.budget.trim import GRADED
from kvprofile.cli.output import print_json, stdout_console
from kvprofile.errors import InputError
from kvprofile.sizes import MAX_BYTES


def plan(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="A checkpoint's folder, a .gguf file, a budget file, or a model name known here."
        ),
    ],
    gpu_memory: Annotated[str, typer.Option(help="Memory of one GPU with its unit (24GiB, 80GB), or a GPU's name.")],
    context: Annotated[int, typer.Option(help="Tokens of one request, prompt and answer.", min=1)],
    output_tokens: Annotated[
        int, typer.Option(help="How many of them are the answer's, which trimmed heads keep.", min=0)
    ] = 0,
    retention: Annotated[
        list[float] | None,
        typer.Option(help="Retention to plan for; repeatable; 0.9 to 0.3 unless given.", min=0, max=1),
    ] = None,
    kind: Annotated[
        str | None,
        typer.Option(help="Heads of a budget file: whole or graded; graded unless given where the file has a probe."),
    ] = None,
    tensor_parallel_size: Annotated[int, typer.Option(help="GPUs that share each layer.", min=1)] = 1,
    dtype: Annotated[
        str | None, typer.Option(help="Data type of the cache: bf16, fp16, fp32, fp8; the model's unless given.")
    ] = None,
    weights_gib: Annotated[
        float | None, typer.Option(help="GiB of the weights, all GPUs together, where it is known better.", min=0)
    ] = None,
    memory_utilization: Annotated[
        float, typer.Option(help="Share of the memory that vLLM may take (0.92 is the default of vLLM 0.32).", max=1)
    ] = 0.9,
    replicas: Annotated[
        int | None, typer.Option(help="Also count a fleet of so many servers: requests, tokens a second, network.")
    ] = None,
    memory_bandwidth: Annotated[
        str | None, typer.Option(help="What one GPU's memory reads in a second (3350GB); known of GPUs given by name.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
) -> None:
    """Count what fits at each retention: cache bytes, requests in flight, the bound on speed. No weights needed."""
    if memory_bandwidth is not None and replicas is None:
        raise InputError("--memory-bandwidth is for --replicas")
    if weights_gib is not None and not weights_gib * 2**30 <= MAX_BYTES:
        raise InputError(f"--weights-gib {weights_gib} is not a size")
    found = capacity.plan(
        _shape_of_gguf(model) if model.lower().endswith(".gguf") else find_shape(model),
        capacity.parse_gpu_memory(gpu_memory),
        context,
        output_tokens=output_tokens,
        retentions=tuple(retention or ()),
        tensor_parallel_size=tensor_parallel_size,
        dtype=dtype,
        weight_bytes=None if weights_gib is None else round(weights_gib * 2**30),
        memory_utilization=memory_utilization,
        kind=kind,
    )
    counted = None if replicas is None else fleet(found, replicas, memory_bandwidth)
    if as_json:
        document = asdict(found)
        document["geometry"] = found.geometry.model_dump(mode="json")
        print_json(document | ({} if counted is None else {"fleet": asdict(counted)}))
    else:
        render(found, stdout_console(), counted)


def _shape_of_gguf(model: str) -> ModelShape:
    """The shape of a GGUF file, whose weights take the bytes that they have in it."""
    found = checkpoint.describe(checkpoint.locate(model))
    shape = ModelShape(
        name=found.source.name,
        geometry=found.geometry,
        window_tokens=None,
        dtype=None,
        max_positions=found.max_positions,
        weight_bytes=found.weight_bytes,
        weight_reason="size of the file's tensors",
        decisions=(Decision("model", found.source.name, "the GGUF file's own config"),),
    )
    return with_budgets(shape)


def render(plan: Capacity, console: Console, counted: Fleet | None = None) -> None:
    """The plan as text and one table, and one of the fleet; fits 80 columns."""
    from kvprofile.budget.profile import SLIDING_ATTENTION

    def line(text: str = "", style: str = "") -> None:
        console.print(Text(text, style=style))

    line(plan.model, "bold")
    line(plan.geometry.describe())
    gpus = f"{plan.tensor_parallel_size} x " if plan.tensor_parallel_size > 1 else ""
    memory = f"{gpus}{plan.gpu or 'a GPU'} with {_size(plan.gpu_memory_bytes)}, {plan.memory_utilization:g} of it used"
    line(f"{memory}; {plan.dtype} cache")
    each = " on each GPU" if plan.tensor_parallel_size > 1 else ""
    pool = plan.cache_bytes_per_gpu
    left = "unknown" if pool is None else _size(pool) if pool > 0 else "nothing"
    line(f"weights {_size(plan.weight_bytes_per_gpu)}{each}, left for the cache {left}{each}")
    line(f"cache per token {_size(plan.kv_bytes_per_token)}{_per_gpu(plan)}")
    without = plan.geometry.layers - len(plan.geometry.cached_layers)
    if without:
        line(f"{without} of {plan.geometry.layers} layers have no cache of the text and are not counted")
    sliding = plan.geometry.layer_types.count(SLIDING_ATTENTION)
    if sliding:
        window = plan.sliding_window_tokens
        held = "the whole context (window unknown)" if window is None else f"their window of {window:,} tokens"
        line(f"{sliding} sliding layers hold {held} at every retention")
    line()
    line(f"requests of {plan.context_tokens:,} tokens", "bold")
    console.print(_table(plan))
    answer = f", and {plan.output_tokens:,} of the answer" if plan.output_tokens else ""
    whose = "of every head" if plan.kind == GRADED else "of trimmed heads"
    line(f"effective: with {plan.sink_tokens} sinks and {plan.recent_tokens} recent tokens {whose}{answer}.")
    line("during a prefill: while one of them prefills, which holds its whole cache.")
    line("speed bound: what a memory-bound decode step can gain, from cache bytes read.")
    if pool is not None and pool <= 0:
        line()
        line("The weights leave no memory for a cache: use more or larger GPUs.", "bold")
    if counted is not None:
        line()
        line(f"{counted.replicas:,} replicas, {counted.gpus:,} GPUs, every pool full of decoding requests", "bold")
        console.print(_fleet_table(counted))
        line("tokens a second: at most, as reading weights and cache allows.")
        if plan.tensor_parallel_size > 1:
            each = _size(counted.exchanged_bytes_per_token_per_gpu)
            line(f"between GPUs: each sends {each} inside its replica for every token, of prompts too.")
        line("Replicas send each other nothing.")
    line()
    line("decided", "bold")
    for decision in (*plan.decisions, *(() if counted is None else counted.decisions)):
        line(f"{decision.what}: {decision.value} ({decision.reason})")


def _table(plan: Capacity) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    graded = plan.kind == GRADED
    heads = () if graded else ("full heads",)
    for name in ("retention", *heads, "effective", "read per step", "requests", "during a prefill", "speed bound"):
        table.add_column(name, justify="right")
    for at in plan.at:
        table.add_row(
            f"{at.retention:g}",
            *(() if graded else (str(at.full_heads),)),
            f"{at.effective_retention:.3f}",
            _size(at.kv_bytes_read_per_step_per_gpu),
            _count(at.requests),
            _count(at.requests_beside_prefill),
            f"{at.speed_bound:.2f}x",
        )
    return table


def _fleet_table(counted: Fleet) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for name in ("retention", "requests", "tokens/s", "gain", "between GPUs"):
        table.add_column(name, justify="right")
    whole = counted.at[0].tokens_per_second
    for at in counted.at:
        tokens, sent = at.tokens_per_second, at.exchanged_bytes_per_second_per_gpu
        table.add_row(
            f"{at.retention:g}",
            _count(at.requests),
            "unknown" if tokens is None else f"{tokens:,.0f}",
            "unknown" if tokens is None or not whole else f"{tokens / whole:.2f}x",
            "unknown" if sent is None else f"{_size(round(sent))}/s",
        )
    return table


def _per_gpu(plan: Capacity) -> str:
    return f", {_size(plan.kv_bytes_per_token_per_gpu)} on each GPU" if plan.tensor_parallel_size > 1 else ""


def _size(size: int | None) -> str:
    """Bytes in the largest binary unit that leaves at least 1 before the point."""
    if size is None:
        return "unknown"
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if size >= factor:
            return f"{size / factor:.4g} {unit}"
    return f"{size} bytes"


def _count(number: int | None) -> str:
    return "unknown" if number is None else f"{number:,}"
