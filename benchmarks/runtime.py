"""Stock vLLM against vLLM with budgets, on this machine in one run: `make bench-runtime`.

Five questions, each with its bound beside it:

- memory: how many requests of 2,048 tokens are in flight, without preemption, in a pool that holds 64 of stock's? What
  does a request hold while it decodes, and at the peak of its prefill?
- kinds: the same as memory with whole and graded heads of one budget file, that of the pretrained model, on random and
  narrow weights of its shape; 16 sinks and a window of 128.
- split: what does computing a layer as two halves cost, where nothing is trimmed (a window longer than any request)?
- groups: what does one more cache group cost a step (the figure behind `packing.COST_PER_GROUP`)?
- pool: output tokens a second and prefix-cache hits, at half of the heads, where requests queue for the pool.

Every leg is an engine in a process of its own. Legs that are timed take turns, one at work while the others wait. The
models are random: memory and speed do not depend on the weights. Heads are full at random, unevenly over layers.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from kvprofile.budget import servable, store
from kvprofile.budget.trim import GRADED, WHOLE, TrimRule

SINKS, WINDOW, BLOCK = 128, 256, 32
REQUEST_TOKENS, STOCK_REQUESTS = 2048, 64
MEMORY_RETENTIONS = (None, 0.7, 0.5, 0.3)
KINDS_BUDGET = Path("models/kv_budget/SmolLM2-135M-Instruct.json")
KINDS_SINKS, KINDS_WINDOW, KINDS_REQUESTS = 16, 128, 16
KINDS_LEGS = ((None, 1.0), *((kind, retention) for retention in (0.5, 0.3, 0.2) for kind in (WHOLE, GRADED)))
SHAPES = {
    "memory": {"layers": 16, "width": 64, "query_heads": 8, "kv_heads": 8, "head_size": 32, "inner": 64},
    "kinds": {"layers": 30, "width": 72, "query_heads": 9, "kv_heads": 3, "head_size": 64, "inner": 64},
    "speed": {"layers": 8, "width": 1024, "query_heads": 16, "kv_heads": 8, "head_size": 64, "inner": 2816},
}
"""Small enough for requests by the hundred on two cores; and large enough that a step is not only bookkeeping."""
VOCABULARY = 2048


# ---- one leg, in its own process ----


class Watch:
    """Notes, at every step of a scheduler, requests that decode, what they hold, and preemptions."""

    def __init__(self, scheduler: Any, pool_bytes: int) -> None:
        self.scheduler, self.schedule = scheduler, scheduler.schedule
        self.managers = scheduler.kv_cache_manager.coordinator.single_type_managers
        self.pool = scheduler.kv_cache_manager.block_pool
        self.block_bytes = pool_bytes // scheduler.kv_cache_config.num_blocks
        scheduler.schedule = self
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self.in_flight = self.preemptions = self.hit_tokens = self.asked_tokens = 0
        self.decode_bytes: list[int] = []
        self.prefill_bytes = 0

    def __call__(self, *arguments: Any) -> Any:
        """Schedule a step and look at what it holds."""
        output = self.schedule(*arguments)
        self.preemptions += len(output.preempted_req_ids or ())
        for new in output.scheduled_new_reqs:
            self.hit_tokens += new.num_computed_tokens
            self.asked_tokens += self.scheduler.requests[new.req_id].num_tokens
        decoding = 0
        for name, count in output.num_scheduled_tokens.items():
            request = self.scheduler.requests[name]
            held = self.block_bytes * sum(
                not block.is_null for manager in self.managers for block in manager.req_to_blocks.get(name, ())
            )
            if request.num_computed_tokens - count >= request.num_prompt_tokens:
                decoding += 1
                self.decode_bytes.append(held)
            else:
                self.prefill_bytes = max(self.prefill_bytes, held)
        if not self.preemptions:
            self.in_flight = max(self.in_flight, decoding)
        return output

    def found(self) -> dict[str, Any]:
        """What was seen since the last call of :meth:`clear`."""
        return {
            "in_flight": self.in_flight,
            "preemptions": self.preemptions,
            "decode_bytes": statistics.fmean(self.decode_bytes) if self.decode_bytes else None,
            "prefill_bytes": self.prefill_bytes,
            "hit_rate": self.hit_tokens / self.asked_tokens if self.asked_tokens else 0.0,
            "pool_bytes": (self.pool.num_gpu_blocks - 1) * self.block_bytes,
            "groups": len(self.managers),
        }


def force_groups(count: int) -> None:
    """Let the runtime pack into about ``count`` groups, however good that is."""
    from kvprofile.runtime import grouping, packing

    def pack(pieces: Any) -> Any:
        sizes = [piece.block_bytes for piece in pieces]
        widths = range(max(sizes), sum(sizes) + 1, max(sizes) // 8)
        found = [packing._weighed(packing._packed(pieces, width)) for width in widths]
        return min(found, key=lambda each: (abs(len(each.groups) - count), each.cost))

    setattr(grouping, "pack", pack)  # noqa: B010


def work() -> None:
    """Serve one engine: a line of JSON with its arguments, then a line for each workload; answers in lines of JSON."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever vLLM prints is log
    from vllm import LLM, SamplingParams

    engine = json.loads(sys.stdin.readline())
    forced = engine.pop("forced_groups", None)
    if forced:
        force_groups(forced)
    llm = LLM(**engine)
    watch = Watch(llm.llm_engine.engine_core.engine_core.scheduler, engine["kv_cache_memory_bytes"])
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        load = json.loads(line)
        rng = random.Random(load["seed"])
        shared = [rng.randrange(4, VOCABULARY) for _ in range(load["shared"])]
        prompts = [
            {"prompt_token_ids": shared + [rng.randrange(4, VOCABULARY) for _ in range(load["prompt"] - len(shared))]}
            for _ in range(load["requests"])
        ]
        options = SamplingParams(temperature=0, max_tokens=load["output"], ignore_eos=True, detokenize=False)
        llm.reset_prefix_cache()
        watch.clear()
        start = time.perf_counter()
        llm.generate(prompts, options, use_tqdm=False)
        seconds = time.perf_counter() - start
        found = {"seconds": seconds, "output_tokens_per_s": load["requests"] * load["output"] / seconds}
        print(json.dumps(found | watch.found()), file=answers, flush=True)


# ---- the run ----


@dataclass
class Leg:
    """An engine in its own process: stock, or with a share of heads full."""

    name: str
    shape: str
    folder: Path
    retention: float | None
    engine: dict[str, Any]
    recent_tokens: int = WINDOW
    settings: dict[str, str] = field(default_factory=dict)
    process: subprocess.Popen[str] = field(init=False)

    def __enter__(self) -> Leg:
        env = {name: value for name, value in os.environ.items() if not name.startswith("LLM_KVZIP_")}
        env |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1"}
        env.pop("VLLM_CPU_KVCACHE_SPACE", None)  # it would outweigh kv_cache_memory_bytes
        if self.retention is not None:
            budget = write_budget(self.folder, SHAPES[self.shape], self.retention, self.recent_tokens)
            env |= {"LLM_KVZIP_ENABLED": "1", "LLM_KVZIP_BUDGET": str(budget)}
        env |= self.settings
        arguments = {"model": str(self.folder), "skip_tokenizer_init": True, "dtype": "bfloat16", "block_size": BLOCK}
        self.log = (self.folder / f"{self.name}.log").open("w")
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            env=env,
            text=True,
        )
        self._ask({**arguments, **self.engine}, "ready")
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.stdin is not None:
            self.process.stdin.close()
        self.process.wait()
        self.log.close()

    def run(self, **load: Any) -> dict[str, Any]:
        """Serve a workload: requests, prompt, output, shared beginning, seed."""
        return dict(json.loads(self._ask({"shared": 0, "seed": 0, **load})))

    def _ask(self, message: dict[str, Any], expected: str | None = None) -> str:
        assert self.process.stdin is not None  # noqa: S101
        assert self.process.stdout is not None  # noqa: S101
        self.process.stdin.write(json.dumps(message) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline().strip()
        if not line or (expected is not None and line != expected):
            sys.exit(f"leg {self.name} ended early:\n{(self.folder / f'{self.name}.log').read_text()[-3000:]}")
        return line


def write_checkpoint(folder: Path, shape: dict[str, int]) -> Path:
    """A random Llama in bfloat16."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=shape["width"],
        intermediate_size=shape["inner"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["query_heads"],
        num_key_value_heads=shape["kv_heads"],
        head_dim=shape["head_size"],
        max_position_embeddings=4096,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def write_budget(folder: Path, shape: dict[str, int], retention: float, recent_tokens: int) -> Path:
    """A runtime file with a share of the heads full, drawn at random over all layers."""
    from kvprofile.budget.profile import ModelIdentity
    from kvprofile.budget.runtime_file import RuntimeFile, RuntimeModel, RuntimeProvenance
    from kvprofile.checkpoint import Source, describe

    geometry = describe(Source(folder.name, folder, None)).geometry
    heads = [(layer, head) for layer in range(shape["layers"]) for head in range(shape["kv_heads"])]
    full = set(random.Random(0).sample(heads, round(retention * len(heads))))
    rows: list[list[int] | None] = [
        [h for h in range(shape["kv_heads"]) if (layer, h) in full] for layer in range(shape["layers"])
    ]
    model = ModelIdentity(
        name=folder.name, revision=None, architecture="LlamaForCausalLM", geometry=geometry,
        geometry_sha256=geometry.sha256(), tokenizer_sha256=None, weights_sha256=None,
    )  # fmt: skip
    provenance = RuntimeProvenance(
        kvprofile_version="random", profile_sha256="none", method="none", statistic="none", imported_from=None,
        retention_asked=retention, retention_realised=len(full) / len(heads), reason=None, floor=0,
        tensor_parallel_size=1, pipeline_stages=[],
    )  # fmt: skip
    made = RuntimeFile(
        model=RuntimeModel.of(model), full_heads=rows, kv_head_order=None, sink_tokens=SINKS,
        recent_tokens=recent_tokens, provenance=provenance,
    )  # fmt: skip
    path = folder / f"{retention}-{recent_tokens}.json"
    path.write_bytes(made.to_bytes())
    return path


def request_bytes(shape: dict[str, int], retention: float, tokens: int, output: int) -> float:
    """What a request's heads need while it decodes, ``output`` of its tokens written: no blocks, no groups."""
    heads = shape["layers"] * shape["kv_heads"]
    full = round(retention * heads)
    held = full * tokens + (heads - full) * min(tokens, SINKS + WINDOW + output)
    return held * 2 * shape["head_size"] * 2


def against(found: dict[str, Any], stock: dict[str, Any], bound: float, needed: float) -> dict[str, Any]:
    """What a leg held, next to the bound on requests in flight, the bytes ``needed`` by each, and stock's peak."""
    return {
        **found,
        "bound": bound,
        "of_bound": found["in_flight"] / bound,
        "held_over_formula": found["decode_bytes"] / needed,
        "prefill_over_stock": found["prefill_bytes"] / stock["prefill_bytes"],
    }


def measure_memory(folder: Path, _rounds: int) -> list[dict[str, Any]]:
    """Requests in flight and bytes held, at several retentions in pools of equal size."""
    shape = SHAPES["memory"]
    write_checkpoint(folder, shape)
    output = 96
    pool = int(STOCK_REQUESTS * request_bytes(shape, 1.0, REQUEST_TOKENS, output))
    rows: list[dict[str, Any]] = []
    for retention in MEMORY_RETENTIONS:
        share = 1.0 if retention is None else retention
        engine = {
            "max_model_len": REQUEST_TOKENS, "enforce_eager": True, "max_num_batched_tokens": 4096, "max_num_seqs": 512,
            "enable_prefix_caching": False, "kv_cache_memory_bytes": pool + pool // STOCK_REQUESTS // 8,
        }  # fmt: skip
        saved = request_bytes(shape, 1.0, REQUEST_TOKENS, output) / request_bytes(shape, share, REQUEST_TOKENS, output)
        expected = STOCK_REQUESTS * saved
        with Leg(f"memory-{share}", "memory", folder, retention, engine) as leg:
            found = leg.run(requests=int(expected * 1.15), prompt=REQUEST_TOKENS - output, output=output)
        stock = rows[0] if rows else found
        bound = stock["in_flight"] * saved
        needed = request_bytes(shape, share, REQUEST_TOKENS - output // 2, output // 2)
        rows.append({"retention": share, **against(found, stock, bound, needed)})
        say(f"memory, {share:.0%} of heads: {found['in_flight']} requests in flight, the bound is {bound:.1f}")
    return rows


def kinds_bytes(share: float, tokens: int, output: int) -> float:
    """As :func:`request_bytes`, where heads keep ``share`` on average, whole or graded."""
    shape = SHAPES["kinds"]
    middle = max(0, tokens - output - KINDS_SINKS - KINDS_WINDOW)
    heads = shape["layers"] * shape["kv_heads"]
    return heads * (tokens - (1.0 - share) * middle) * 2 * shape["head_size"] * 2


def kinds_blocks(shares: list[float], prompt: int, output: int) -> float:
    """As :func:`kinds_bytes`, in the whole blocks that the trim rule says, over the steps that write ``output``."""
    shape, rule = SHAPES["kinds"], TrimRule(KINDS_SINKS, KINDS_WINDOW, BLOCK)
    held = [
        sum(-(-rule.held_tokens(tokens, prompt, share) // BLOCK) * BLOCK for share in shares)
        for tokens in range(prompt + 1, prompt + output)
    ]
    return statistics.fmean(held) * 2 * shape["head_size"] * 2


def measure_kinds(folder: Path, _rounds: int) -> list[dict[str, Any]]:
    """Requests in flight and bytes held by whole and graded heads, in pools of equal size."""
    profile = store.load(KINDS_BUDGET)
    model = write_checkpoint(folder / KINDS_BUDGET.stem, SHAPES["kinds"])
    output = 96
    pool = int(KINDS_REQUESTS * kinds_bytes(1.0, REQUEST_TOKENS, output))
    engine = {
        "max_model_len": REQUEST_TOKENS, "enforce_eager": True, "max_num_batched_tokens": 4096, "max_num_seqs": 512,
        "enable_prefix_caching": False, "kv_cache_memory_bytes": pool + pool // KINDS_REQUESTS // 8,
    }  # fmt: skip
    rows: list[dict[str, Any]] = []
    for kind, retention in KINDS_LEGS:
        share, settings = 1.0, {}
        heads = [1.0] * (SHAPES["kinds"]["layers"] * SHAPES["kinds"]["kv_heads"])
        if kind is not None:
            budget = servable.of_profile(profile, retention, kind=kind)
            share, heads = budget.retention_realised, [value or 0.0 for row in budget.heads for value in row]
            asked = {"BUDGET": KINDS_BUDGET.resolve(), "KIND": kind, "RETENTION": retention, "SINK": KINDS_SINKS}
            settings = {f"LLM_KVZIP_{name}": str(value) for name, value in {**asked, "RECENT": KINDS_WINDOW}.items()}
            settings["LLM_KVZIP_ENABLED"] = "1"
        saved = kinds_bytes(1.0, REQUEST_TOKENS, output) / kinds_bytes(share, REQUEST_TOKENS, output)
        name = "stock" if kind is None else f"{kind} {retention:g}"
        with Leg(f"kinds-{name}", "kinds", model, None, engine, settings=settings) as leg:
            found = leg.run(requests=int(KINDS_REQUESTS * saved * 1.15), prompt=REQUEST_TOKENS - output, output=output)
        stock = rows[0] if rows else found
        bound = stock["in_flight"] * saved
        needed = kinds_bytes(share, REQUEST_TOKENS - output // 2, output // 2)
        in_blocks = kinds_blocks(heads, REQUEST_TOKENS - output, output)
        told = {"leg": name, "held_over_blocks": found["decode_bytes"] / in_blocks}
        rows.append({**told, **against(found, stock, bound, needed)})
        say(f"kinds, {name}: {found['in_flight']} requests in flight, the bound is {bound:.1f}")
    return rows


def measure_split(folder: Path, rounds: int) -> dict[str, Any]:
    """Output tokens a second of stock and of split layers that keep everything, taking turns."""
    write_checkpoint(folder, SHAPES["speed"])
    engine = {"max_model_len": 1024, "kv_cache_memory_bytes": 2**30, "max_num_seqs": 64}
    load = {"requests": 32, "prompt": 256, "output": 96}
    rates: dict[str, list[float]] = {"stock": [], "split": []}
    with (
        Leg("split-stock", "speed", folder, None, engine) as stock,
        Leg("split-parts", "speed", folder, 0.5, engine, recent_tokens=100_000) as split,
    ):
        for leg in (stock, split):
            leg.run(**load | {"requests": 8, "output": 8})  # compile and warm up
        for number in range(rounds):
            turns = [("stock", stock), ("split", split)]
            for name, leg in turns if number % 2 == 0 else turns[::-1]:
                rates[name].append(leg.run(**load, seed=number)["output_tokens_per_s"])
            say(f"split, round {number + 1}: {rates['split'][-1] / rates['stock'][-1]:.3f} of stock's output tokens/s")
    ratios = [split / stock for split, stock in zip(rates["split"], rates["stock"], strict=True)]
    return {"load": load, "rates": rates, "ratios": ratios, "ratio": statistics.median(ratios)}


def measure_groups(folder: Path, rounds: int) -> dict[str, Any]:
    """What more cache groups cost, nothing trimmed: a few groups against many, taking turns."""
    write_checkpoint(folder, SHAPES["speed"])
    engine = {"max_model_len": 1024, "kv_cache_memory_bytes": 2**30, "max_num_seqs": 64}
    load = {"requests": 32, "prompt": 256, "output": 96}
    rates: dict[int, list[float]] = {}
    with (
        Leg("groups-few", "speed", folder, 0.5, engine | {"forced_groups": 2}, recent_tokens=100_000) as few,
        Leg("groups-many", "speed", folder, 0.5, engine | {"forced_groups": 12}, recent_tokens=100_000) as many,
    ):
        for leg in (few, many):
            leg.run(**load | {"requests": 8, "output": 8})
        for number in range(rounds):
            for leg in (few, many) if number % 2 == 0 else (many, few):
                found = leg.run(**load, seed=number)
                rates.setdefault(found["groups"], []).append(found["output_tokens_per_s"])
            say(
                f"groups, round {number + 1}: " + ", ".join(f"{n} {rate[-1]:.0f} tokens/s" for n, rate in rates.items())
            )
    fewest, most = min(rates), max(rates)
    slower = [a / b - 1 for a, b in zip(rates[fewest], rates[most], strict=True)]
    costs = [each / (most - fewest) for each in slower]
    return {"load": load, "rates": rates, "cost_per_group": statistics.median(costs), "costs": costs}


def measure_pool(folder: Path, rounds: int) -> dict[str, Any]:
    """Output tokens a second and prefix hits where requests queue for a small pool, taking turns."""
    shape = SHAPES["speed"]
    write_checkpoint(folder, shape)
    fits = 8
    output = 128
    pool = int(fits * request_bytes(shape, 1.0, REQUEST_TOKENS, output))
    engine = {"max_model_len": REQUEST_TOKENS, "kv_cache_memory_bytes": pool, "max_num_seqs": 64}
    load = {"requests": 24, "prompt": 1536, "output": output, "shared": 1024}
    found: dict[str, list[dict[str, Any]]] = {"stock": [], "half": []}
    with (
        Leg("pool-stock", "speed", folder, None, engine) as stock,
        Leg("pool-half", "speed", folder, 0.5, engine) as half,
    ):
        for leg in (stock, half):
            leg.run(**load | {"requests": 2, "output": 8})
        for number in range(rounds):
            turns = [("stock", stock), ("half", half)]
            for name, leg in turns if number % 2 == 0 else turns[::-1]:
                found[name].append(leg.run(**load, seed=number))
            say(f"pool, round {number + 1}: {_rate(found['half'][-1]) / _rate(found['stock'][-1]):.3f} of stock's")
    pairs = list(zip(found["half"], found["stock"], strict=True))
    whole, half_kept = (request_bytes(shape, share, REQUEST_TOKENS, output) for share in (1.0, 0.5))
    bound = whole / half_kept
    ratio = statistics.median(_rate(a) / _rate(b) for a, b in pairs)
    return {
        "load": load,
        "pool_bytes": pool,
        "rounds": found,
        "ratio": ratio,
        "bound": bound,
        "of_bound": ratio / bound,
        "in_flight": {name: max(row["in_flight"] for row in rows) for name, rows in found.items()},
        "hit_rate": {name: statistics.fmean(row["hit_rate"] for row in rows) for name, rows in found.items()},
    }


def _rate(row: dict[str, Any]) -> float:
    return float(row["output_tokens_per_s"])


PARTS = {
    "memory": measure_memory, "kinds": measure_kinds, "split": measure_split, "groups": measure_groups,
    "pool": measure_pool,
}  # fmt: skip


def say(message: str) -> None:
    """One line of progress."""
    print(message, file=sys.stderr, flush=True)


def show(result: dict[str, Any]) -> None:
    """Tables for people."""
    console = Console()
    if "memory" in result:
        titles = ("in flight", "bound", "of bound", "held / formula", "prefill peak / stock")
        table = Table("heads full", *titles, title=f"{REQUEST_TOKENS:,}-token requests")
        for row in result["memory"]:
            ratios = (f"{row[key]:.3f}" for key in ("of_bound", "held_over_formula", "prefill_over_stock"))
            table.add_row(f"{row['retention']:.0%}", str(row["in_flight"]), f"{row['bound']:.1f}", *ratios)
        console.print(table)
    if "kinds" in result:
        more = ("in flight", "bound", "of bound", "held / tokens", "held / blocks", "prefill peak / stock", "groups")
        table = Table("heads", *more, title=f"{REQUEST_TOKENS:,}-token requests, {KINDS_BUDGET.stem}'s budgets")
        for row in result["kinds"]:
            keys = ("of_bound", "held_over_formula", "held_over_blocks", "prefill_over_stock")
            ratios = (f"{row[key]:.3f}" for key in keys)
            table.add_row(row["leg"], str(row["in_flight"]), f"{row['bound']:.1f}", *ratios, str(row["groups"]))
        console.print(table)
    if "split" in result:
        split = result["split"]
        low, high = min(split["ratios"]), max(split["ratios"])
        console.print(f"split alone: {split['ratio']:.3f} of stock's output tokens/s ({low:.3f} to {high:.3f})")
    if "groups" in result:
        groups = result["groups"]
        low, high = min(groups["costs"]), max(groups["costs"])
        counts = " against ".join(map(str, groups["rates"]))
        console.print(
            f"one more group: {groups['cost_per_group']:.2%} of a step ({low:.2%} to {high:.2%}), {counts} groups"
        )
    if "pool" in result:
        pool = result["pool"]
        console.print(
            f"half of the heads, full pool: {pool['ratio']:.3f} of stock's output tokens/s; the bound is "
            f"{pool['bound']:.2f}, {pool['of_bound']:.0%} of it reached; in flight {pool['in_flight']['half']} against "
            f"{pool['in_flight']['stock']}; prefix hits {pool['hit_rate']['half']:.1%} against "
            f"{pool['hit_rate']['stock']:.1%}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description="Stock vLLM against vLLM with budgets.")
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="all unless given")
    parser.add_argument("--rounds", type=int, default=5, help="turns of every timed leg")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work()
        return
    parts = arguments.parts or list(PARTS)
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for part in parts:
            result[part] = PARTS[part](Path(folder) / part, arguments.rounds)
    if arguments.json:
        print(json.dumps(result, indent=2))
    else:
        show(result)


if __name__ == "__main__":
    main()
