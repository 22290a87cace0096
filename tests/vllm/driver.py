"""Runs in a process of its own: engines one after the other, several batches each, and what their schedulers did.

Reads jobs as JSON from stdin, prints ``RESULT`` and JSON for each. The engines are whatever the environment makes them.
"""

from __future__ import annotations

import json
import os
import sys

from tests.vllm import as_asked, graphs, interpreter, planted


class Recorder:
    """Watches a scheduler: admissions of each request, and blocks held by each cache group after each step."""

    def __init__(self, scheduler, every_step):
        self.scheduler, self.every_step = scheduler, every_step
        self.admissions, self.chunks, self.held, self.preemptions, self.hits = {}, {}, [], 0, {}
        self.stock = scheduler.schedule
        scheduler.schedule = self.schedule

    def watch_pool(self, pool):
        """Count blocks that are handed out and, apart, those that come back with the end of a request."""
        self.handed_out = self.came_back = 0
        hand_out, managers = pool.get_new_blocks, self.scheduler.kv_cache_manager.coordinator.single_type_managers

        def counting(count):
            self.handed_out += count
            return hand_out(count)

        pool.get_new_blocks = counting
        for manager in managers:
            manager.pop_blocks_for_free = self._counting_ends(manager.pop_blocks_for_free)

    def _counting_ends(self, stock):
        def pop_blocks_for_free(*args):
            blocks = list(stock(*args))
            self.came_back += sum(not block.is_null for block in blocks)
            return blocks

        return pop_blocks_for_free

    def schedule(self, *args):
        output = self.stock(*args)
        admitted = {new.req_id for new in output.scheduled_new_reqs} | output.scheduled_cached_reqs.resumed_req_ids
        self.preemptions += len(output.preempted_req_ids or ())
        for name, count in output.num_scheduled_tokens.items():
            request = self.scheduler.requests[name]
            start = request.num_computed_tokens - count
            if name in admitted:
                self.admissions.setdefault(name, []).append(request.num_tokens)
                self.chunks.setdefault(name, []).append([])
                self.hits.setdefault(name, []).append(start)
            self.chunks[name][-1].append((start, count))
        if self.every_step:
            managers = self.scheduler.kv_cache_manager.coordinator.single_type_managers
            self.held.append(
                {
                    name: [
                        sum(not block.is_null for block in manager.req_to_blocks.get(name, ())) for manager in managers
                    ]
                    for name in output.num_scheduled_tokens
                }
            )
        return output

    def take(self):
        found = {
            "admissions": self.admissions,
            "chunks": self.chunks,
            "hits": self.hits,
            "held": self.held,
            "preemptions": self.preemptions,
        }
        self.admissions, self.chunks, self.hits, self.held, self.preemptions = {}, {}, {}, [], 0
        return found


def sabotage_moves(how):
    """Let workers forget tokens that stay, move them once their blocks were freed and filled, or keep the old rows."""
    from kvprofile.runtime import moves

    stock = moves.Moved._move
    if how == "missing":
        moves.Moved._move = lambda *_: None
    elif how == "stale":
        moves._replace = lambda *_: None
    elif how == "late":
        from vllm.v1.worker.gpu_model_runner import GPUModelRunner

        due, update = [], GPUModelRunner._update_states
        moves.Moved._move = lambda *args: due.append(args)

        def _update_states(self, *args):
            result = update(self, *args)
            while due:
                stock(*due.pop(0))
            return result

        GPUModelRunner._update_states = _update_states
    else:
        raise ValueError(how)


def reported():
    """What the runtime has counted, or None where it is off."""
    stats = sys.modules.get("kvprofile.runtime.stats")
    return stats.read() if stats else None


def patched():
    """Functions that kvprofile has replaced, by name."""
    patching = sys.modules.get("kvprofile.runtime.patching")
    return [f"{owner.__name__}.{name}" for owner, name in patching._originals] if patching else []


def gather():
    """Let no layer load its heads in order."""
    from kvprofile.runtime import permute

    permute._is_plain = lambda *_: False


def generate(llm, recorder, batch):
    """Outputs of one batch and what the scheduler did."""
    from vllm import SamplingParams

    options = [
        SamplingParams(temperature=0, max_tokens=r["max_tokens"], detokenize=False, ignore_eos=True, logprobs=0)
        for r in batch
    ]
    found = llm.generate([{"prompt_token_ids": r["prompt"]} for r in batch], options, use_tqdm=False)
    schedule = recorder.take()
    outputs = []
    for output in found:
        (name,) = [n for n in schedule["admissions"] if n.split("-")[0] == output.request_id.split("-")[0]]
        outputs.append(
            {
                "tokens": list(output.outputs[0].token_ids),
                "logprobs": [next(iter(step.values())).logprob for step in output.outputs[0].logprobs],
                "admissions": schedule["admissions"][name],
                "chunks": schedule["chunks"][name],
                "hits": schedule["hits"][name],
                "held": [step[name] for step in schedule["held"] if name in step],
            }
        )
    return {"outputs": outputs, "preemptions": schedule["preemptions"]}


def backends(core):
    """Names of the attention backends of an engine's layers, as vLLM knows them; None of workers elsewhere."""
    driver = getattr(core.model_executor, "driver_worker", None)
    if driver is None:
        return None
    runner = driver.worker.model_runner
    return sorted({group.backend.get_name() for groups in runner.attn_groups for group in groups})


def serve(job):
    """One engine from start to end."""
    from vllm import LLM

    os.environ.update(job["environment"])
    llm = LLM(**job["engine"])
    core = llm.llm_engine.engine_core.engine_core
    recorder = Recorder(core.scheduler, job["every_step"])
    recorder.watch_pool(core.scheduler.kv_cache_manager.block_pool)
    batches = []
    for number, batch in enumerate(job["batches"]):
        if number == job.get("reload_before"):
            llm.collective_rpc("reload_weights")
        batches.append(generate(llm, recorder, batch))
    pool = core.scheduler.kv_cache_manager.block_pool
    found = reported()
    reclaimed = {
        "counted": recorder.handed_out - recorder.came_back,
        "reported": found and found["kv_blocks_reclaimed_total"],
        "kept": found and found["kv_blocks_kept_total"],
    }
    managers = core.scheduler.kv_cache_manager.coordinator.single_type_managers
    groups = [
        [type(manager.kv_cache_spec).__name__, len(group.layer_names)]
        for manager, group in zip(managers, core.scheduler.kv_cache_config.kv_cache_groups, strict=True)
    ]
    runner = llm.llm_engine.vllm_config.use_v2_model_runner
    shares = [getattr(manager.kv_cache_spec, "share", None) for manager in managers]
    result = {
        "batches": batches,
        "groups": groups,
        "shares": shares,
        "free_blocks": pool.get_num_free_blocks(),
        "v2": runner,
        "async": llm.llm_engine.vllm_config.scheduler_config.async_scheduling,
        "backends": backends(core),
        "graphs": dict(graphs.counts),
    }
    result |= {"blocks": pool.num_gpu_blocks, "patched": patched(), "reclaimed": reclaimed}
    return result | {"runtime_modules": sorted(name for name in sys.modules if name.startswith("kvprofile.runtime"))}


def main():
    jobs = json.load(sys.stdin)
    if os.environ.get(interpreter.WANTED):
        interpreter.enable()
    if os.environ.get(as_asked.WANTED):
        as_asked.enable()
    if os.environ.get(graphs.WANTED):
        graphs.enable([int(size) for size in os.environ[graphs.WANTED].split(",")])
    if os.environ.get("SPAN_TOKENS"):
        from kvprofile.budget import trim

        trim.SPAN_TOKENS = int(os.environ["SPAN_TOKENS"])
    if os.environ.get("SABOTAGE_VIEW"):
        planted.plant(os.environ["SABOTAGE_VIEW"])
    if os.environ.get("SABOTAGE_MOVES"):
        sabotage_moves(os.environ["SABOTAGE_MOVES"])
    if os.environ.get("GATHER_HEADS"):
        gather()
    for number, job in enumerate(jobs):
        if number:
            from vllm.distributed import cleanup_dist_env_and_memory

            cleanup_dist_env_and_memory()
        print("RESULT", json.dumps(serve(job)), flush=True)


if __name__ == "__main__":
    main()
