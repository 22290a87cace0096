"""A soak of the trimmed vLLM on the bundled checkpoint: `python -m tests.vllm.soak --requests 3000`.

One engine with a pool so small that requests are preempted all the time: prompts of random lengths, many with a shared
beginning, in chunks; greedy and sampled outputs of random lengths; aborts at random moments. All along, blocks that are
free and blocks that requests hold must add up to the pool; at the end nothing may be held, by vLLM or by the runtime.
Of the greedy outputs a share is compared, token by token, with `kvprofile.evaluate.simulate`.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
from collections import Counter, deque
from pathlib import Path

from tests.helpers.models import POCKET, ROOT

LONGEST, BLOCK_TOKENS, STEPS_BETWEEN_LOOKS = 1024, 32, 100
IN_FLIGHT, ABORTED, SAMPLED, CHECKED = 12, 0.15, 0.3, 0.12
"""Most requests at once, and shares of requests: aborted, sampled, and greedy ones that are compared."""


def draw(rng, texts, shared):
    """One request: ids, output tokens, temperature, the step of its life at which it is aborted, whether to compare."""
    length = min(LONGEST - 130, int(rng.choice((8, 40, 120, 300, 600)) * rng.uniform(0.5, 1.5)))
    begin = shared[: rng.choice((0, 0, 64, 100, 320))]
    text = rng.choice(texts)
    start = rng.randrange(len(text) - length)
    ids = (begin + text[start : start + length])[: LONGEST - 130]
    aborted = rng.random() < ABORTED
    sampled = not aborted and rng.random() < SAMPLED
    return {
        "prompt": ids,
        "max_tokens": rng.choice((1, 2, 8, 30, 60, 120)),
        "temperature": 0.8 if sampled else 0.0,
        "abort_after": int(rng.choice((0, 10, 30, 60, 120)) * rng.uniform(0, 2)) if aborted else None,
        "compare": not aborted and not sampled and rng.random() < CHECKED,
    }


# ---- the engine's process ----


def state(scheduler, name):
    """Where in its life a request is: waiting, prefilling, decoding or preempted; None once it is over."""
    request = next((r for r in scheduler.requests.values() if r.request_id.rsplit("-", 1)[0] == name), None)
    if request is None:
        return None
    if request.status.name == "RUNNING":
        return "decoding" if request.num_computed_tokens >= request.num_prompt_tokens else "prefilling"
    return request.status.name.lower()


def look(scheduler):
    """What is wrong with the accounts of blocks, in words; and how many blocks are held."""
    pool = scheduler.kv_cache_manager.block_pool
    managers = scheduler.kv_cache_manager.coordinator.single_type_managers
    held = Counter(
        block.block_id
        for manager in managers
        for row in manager.req_to_blocks.values()
        for block in row
        if not block.is_null
    )
    problems = []
    if len(held) + pool.get_num_free_blocks() + 1 != pool.num_gpu_blocks:
        problems.append(f"{len(held)} held, {pool.get_num_free_blocks()} free, 1 null, of {pool.num_gpu_blocks}")
    wrong = [block.block_id for block in pool.blocks if not block.is_null and block.ref_cnt != held[block.block_id]]
    if wrong:
        problems.append(f"{len(wrong)} blocks are counted otherwise than they are held")
    return problems, len(held)


def left_behind(scheduler):
    """What is still kept of requests, by holder, when none is left."""
    found = {"scheduler": len(scheduler.requests)}
    for manager in scheduler.kv_cache_manager.coordinator.single_type_managers:
        for name in ("req_to_blocks", "num_cached_block", "_prefill_end", "_lives", "_moves", "_moved", "_holds"):
            kept = len(getattr(manager, name, ()))
            found[f"{type(manager).__name__}.{name}"] = found.get(f"{type(manager).__name__}.{name}", 0) + kept
    return {name: count for name, count in found.items() if count}


def resident_mib():
    """Resident memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def serve(job):
    """Run all requests through one engine; prints a line for each comparison and one of counts."""
    from vllm import LLM, SamplingParams

    from tests.vllm.driver import Recorder, reported

    engine = LLM(**job["engine"]).llm_engine
    scheduler = engine.engine_core.engine_core.scheduler
    recorder = Recorder(scheduler, every_step=False)
    rng = random.Random(job["seed"])
    waiting = deque(enumerate(job["requests"]))
    ages, counts, problems, memory, steps = {}, Counter(), [], [], 0
    while waiting or ages:
        for _ in range(rng.choice((0, 0, 1, 2, 5))):
            if waiting and len(ages) < IN_FLIGHT:
                number, asked = waiting.popleft()
                options = SamplingParams(
                    temperature=asked["temperature"], max_tokens=asked["max_tokens"],
                    detokenize=False, ignore_eos=True,
                )  # fmt: skip
                engine.add_request(str(number), {"prompt_token_ids": asked["prompt"]}, options)
                ages[str(number)] = 0
        for output in engine.step():
            if not output.finished:
                continue
            asked, tokens = job["requests"][int(output.request_id)], list(output.outputs[0].token_ids)
            ages.pop(output.request_id)
            counts["finished"] += 1
            counts["tokens"] += len(tokens)
            if len(tokens) != asked["max_tokens"]:
                problems.append(f"request {output.request_id} gave {len(tokens)} of {asked['max_tokens']} tokens")
            life = take(recorder, output.request_id, counts)
            if asked["compare"]:
                print("COMPARE", json.dumps({"number": int(output.request_id), "tokens": tokens, **life}), flush=True)
        for name in list(ages):
            ages[name] += 1
            last_step = job["requests"][int(name)]["abort_after"]
            if last_step is not None and ages[name] > last_step:
                counts[f"aborted while {state(scheduler, name)}"] += 1
                engine.abort_request([name])
                take(recorder, name, counts)
                ages.pop(name)
        steps += 1
        if steps % STEPS_BETWEEN_LOOKS == 0:
            found, held = look(scheduler)
            problems += [f"step {steps}: {problem}" for problem in found]
            counts["most blocks held"] = max(counts["most blocks held"], held)
            memory.append(resident_mib())
    counts["preemptions"] = recorder.preemptions
    for _ in range(3):  # what the last step leaves to the next
        engine.step()
    found, held = look(scheduler)
    problems += [f"at the end: {problem}" for problem in found]
    if held:
        problems.append(f"{held} blocks are held by nobody")
    problems += [f"{count} requests left behind in {name}" for name, count in left_behind(scheduler).items()]
    quarter = max(1, len(memory) // 4)
    resident = [round(statistics.median(memory[n * quarter : (n + 1) * quarter] or [0])) for n in range(4)]
    counts |= {"steps": steps, "blocks": scheduler.kv_cache_manager.block_pool.num_gpu_blocks}
    found = reported()
    counts["blocks reclaimed"] = found and found["kv_blocks_reclaimed_total"]
    end = {"counts": counts, "problems": problems, "resident_mib": resident}
    print("END", json.dumps(end | {"v2": engine.vllm_config.use_v2_model_runner}), flush=True)


def take(recorder, name, counts):
    """What the recorder saw of one request, which it forgets."""
    full = next((seen for seen in recorder.chunks if seen.rsplit("-", 1)[0] == name), None)
    life = {key: getattr(recorder, key).pop(full, []) for key in ("admissions", "chunks", "hits")}
    counts["prefix hits"] += sum(hit > 0 for hit in life["hits"])
    counts["chunked prefills"] += sum(sum(size > 1 for _, size in chunks) > 1 for chunks in life["chunks"])
    return life


# ---- the other side ----


def requests(count, seed):
    """Random requests of real text."""
    from transformers import AutoTokenizer

    from kvprofile.corpus.generate import generate_text

    tokenizer = AutoTokenizer.from_pretrained(POCKET)
    texts = [tokenizer(generate_text("prose", n, 12_000), add_special_tokens=False)["input_ids"] for n in range(12)]
    rng = random.Random(seed)
    return [draw(rng, texts, texts[0]) for _ in range(count)]


def budgets(retention, rule, folder, graded):
    """The bundled checkpoint, what its profile keeps at a retention, the file that says so, and what chooses tokens."""
    import torch
    from transformers import AutoModelForCausalLM

    from kvprofile.budget import store
    from kvprofile.budget.choice import choose, choose_whole
    from kvprofile.budget.probe import load, path_of
    from kvprofile.checkpoint import describe, locate
    from kvprofile.evaluate.token_choice import ByProbe
    from tests.vllm.engine import Subject, write_budget

    geometry = describe(locate(str(POCKET))).geometry
    model = AutoModelForCausalLM.from_pretrained(POCKET, dtype=torch.float32, attn_implementation="sdpa")
    file = ROOT / "models" / "kv_budget" / "pocket.json"
    profile = store.load(file)
    subject = Subject(model, POCKET, geometry)
    if graded:
        return subject, choose(profile, retention, kind="graded").heads, file, ByProbe(load(path_of(file), profile))
    heads = choose_whole(profile, retention).heads
    return subject, heads, write_budget(folder / "soak.json", subject, heads, rule, name="pocket"), None


def soak(
    count, folder, *, seed=0, retention=0.5, sink_tokens=16, recent_tokens=64, pool_blocks=90, stock=False,
    graded=False, program=(),
):  # fmt: skip
    """Serve ``count`` requests and compare; ``stock`` leaves the budget out. Gives counts and problems in words."""
    from kvprofile.budget.trim import TrimRule
    from kvprofile.evaluate.simulate import simulating
    from tests.vllm.engine import compare, environment

    rule = TrimRule(sink_tokens, recent_tokens, BLOCK_TOKENS)
    subject, heads, budget, choice = budgets(retention, rule, folder, graded)
    wanted = {"KIND": "graded", "RETENTION": retention, "SINK": sink_tokens, "RECENT": recent_tokens} if graded else {}
    heads = [[1.0] * len(row) for row in heads] if stock else heads
    asked = requests(count, seed)
    engine = {
        "model": str(POCKET), "skip_tokenizer_init": True, "dtype": "float32", "enforce_eager": True,
        "max_model_len": LONGEST, "block_size": BLOCK_TOKENS, "max_num_batched_tokens": 256, "max_num_seqs": 12,
        "enable_prefix_caching": True, "num_gpu_blocks_override": pool_blocks,
    }  # fmt: skip
    job = {"engine": engine, "requests": asked, "seed": seed}
    command = [sys.executable, *(program or ("-m", "tests.vllm.soak")), "--serve"]
    log = folder / "engine.log"
    with log.open("w") as errors:
        child = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, cwd=ROOT,
            env=environment(None if stock else budget, **{f"LLM_KVZIP_{name}": str(v) for name, v in wanted.items()}),
        )  # fmt: skip
        child.stdin.write(json.dumps(job))
        child.stdin.close()
        lines = [line.split(" ", 1) for line in child.stdout if line.startswith(("COMPARE ", "END "))]
        child.wait()
    end = next((json.loads(text) for kind, text in lines if kind == "END"), None)
    if end is None:
        raise SystemExit(f"the engine ended early:\n{log.read_text()[-3000:]}")
    counts, problems = Counter(end["counts"]), end["problems"]
    with simulating(subject.model, subject.geometry, heads, rule, choice) as simulation:
        for kind, text in lines:
            if kind == "COMPARE":
                output = json.loads(text)
                try:
                    prompt = asked[output["number"]]["prompt"]
                    tokens, ties = compare(simulation, prompt, output, end["v2"] or graded)
                except AssertionError as error:
                    problems.append(f"request {output['number']} differs from the simulation: {error}")
                    continue
                counts.update({"compared": 1, "tokens compared": tokens, "near ties": ties})
    settings = {"requests": count, "retention": None if stock else retention, "sink_tokens": sink_tokens}
    settings |= {"recent_tokens": recent_tokens, "pool_blocks": pool_blocks, "seed": seed, "graded": graded}
    return {"settings": settings, "counts": counts, "problems": problems,
            "resident_mib": end["resident_mib"]}  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description="A soak of the trimmed vLLM.")
    parser.add_argument("--requests", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--retention", type=float, default=0.5)
    parser.add_argument("--sink-tokens", type=int, default=16)
    parser.add_argument("--recent-tokens", type=int, default=64)
    parser.add_argument("--pool-blocks", type=int, default=90)
    parser.add_argument("--graded", action="store_true", help="graded heads instead of whole ones")
    parser.add_argument("--stock", action="store_true", help="without budgets, to compare memory")
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "soak")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.serve:
        serve(json.load(sys.stdin))
        return
    asked.output.mkdir(parents=True, exist_ok=True)
    found = soak(
        asked.requests,
        asked.output,
        seed=asked.seed,
        retention=asked.retention,
        sink_tokens=asked.sink_tokens,
        recent_tokens=asked.recent_tokens,
        pool_blocks=asked.pool_blocks,
        stock=asked.stock,
        graded=asked.graded,
    )
    print(json.dumps(found, indent=2))
    sys.exit(bool(found["problems"]))


if __name__ == "__main__":
    main()
