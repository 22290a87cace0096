"""Runs in a process of its own: one vLLM engine, batches of requests, and what its scheduler did with them.

``python -m kvprofile.verify.child_engine JOB RESULT``: two files of JSON. Whether the plugin is in force is the
environment's choice, as wherever vLLM runs. The engine's core lives in this process, so that it can be watched.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

STARTED, FINISHED = "started", "finished"
"""How far an engine came, in the file of its result."""

BEST = 5
"""Tokens whose log-probabilities are asked for at every place: several may be nearly tied."""


class Watch:
    """What a scheduler does: for each request the chunks in which it is computed, for each time it is admitted."""

    def __init__(self, scheduler: Any) -> None:
        self.scheduler, self.stock = scheduler, scheduler.schedule
        self.lives: dict[str, list[dict[str, Any]]] = {}
        self.preemptions = 0
        scheduler.schedule = self.schedule

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        """The scheduler's own, noted."""
        output = self.stock(*args, **kwargs)
        admitted = {new.req_id for new in output.scheduled_new_reqs} | output.scheduled_cached_reqs.resumed_req_ids
        self.preemptions += len(output.preempted_req_ids or ())
        for name, count in output.num_scheduled_tokens.items():
            request = self.scheduler.requests[name]
            start = request.num_computed_tokens - count
            if name in admitted:
                self.lives.setdefault(name, []).append({"tokens": request.num_tokens, "hit": start, "chunks": []})
            self.lives[name][-1]["chunks"].append([start, count])
        return output


def generate(llm: Any, watch: Watch, batch: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Greedy answers of a batch: tokens, log-probabilities of each and of the best, and what the scheduler did."""
    from vllm import SamplingParams

    options = [
        SamplingParams(temperature=0, max_tokens=each["max_tokens"], detokenize=False, ignore_eos=True, logprobs=BEST)
        for each in batch
    ]
    found = llm.generate([{"prompt_token_ids": each["prompt"]} for each in batch], options, use_tqdm=False)
    outputs = []
    for asked, answer in zip(batch, found, strict=True):
        output, metrics = answer.outputs[0], answer.metrics
        (name,) = [each for each in watch.lives if each.split("-")[0] == answer.request_id.split("-")[0]]
        tokens = list(output.token_ids)
        timed = metrics is not None and len(tokens) > 1
        outputs.append(
            {
                "name": asked["name"],
                "id": name,
                "tokens": tokens,
                "logprobs": [step[token].logprob for token, step in zip(tokens, output.logprobs, strict=True)],
                "best": [{str(token): each.logprob for token, each in step.items()} for step in output.logprobs],
                "lives": watch.lives[name],
                "seconds": (metrics.last_token_ts - metrics.first_token_ts) / (len(tokens) - 1) if timed else None,
            }
        )
    watch.lives.clear()
    return outputs


def _facts(llm: Any, config: Any, model: str) -> dict[str, Any]:
    """The key of this engine's attestation where the plugin is in force, else what any engine tells.

    Of ``config`` as it was made: workers resolve some of it, which the process that reads attestations never sees.
    """
    from vllm.platforms import current_platform

    from kvprofile.runtime import here
    from kvprofile.runtime.engine_budget import CONFIG_KEY, EngineBudget

    runner = "V2" if config.use_v2_model_runner else "V1"
    found: dict[str, Any] = {"platform": current_platform.device_type, "model_runner": runner, "key": None}
    found["dtype"] = str(config.model_config.dtype).removeprefix("torch.")
    found["kv_cache_dtype"] = str(config.cache_config.cache_dtype)
    if CONFIG_KEY in (config.additional_config or {}):
        workers = llm.collective_rpc(here.of_worker)
        if any(worker != workers[0] for worker in workers):
            raise ValueError(f"workers differ in attention backend, block size or device: {workers}")
        found["key"] = here.of_config(config, model, EngineBudget.of(config.additional_config)) | workers[0]
    return found


def _groups(scheduler: Any) -> list[dict[str, Any]]:
    """Of each cache group whether its heads are trimmed or full, and the share that they keep of a graded budget."""
    return [
        {
            "trimmed": hasattr(manager.kv_cache_spec, "recent_tokens"),
            "full": type(manager.kv_cache_spec).__name__ == "FullAttentionSpec",
            "share": getattr(manager.kv_cache_spec, "share", None),
        }
        for manager in scheduler.kv_cache_manager.coordinator.single_type_managers
    ]


def run(job: dict[str, Any], result: Path) -> None:
    """Start the engine, say so, answer every batch, and say what there was."""
    from vllm import LLM
    from vllm.engine.arg_utils import EngineArgs
    from vllm.usage.usage_lib import UsageContext

    try:
        config = EngineArgs(**job["arguments"]).create_engine_config(UsageContext.LLM_CLASS)
    except Exception as error:
        sys.exit(f"{type(error).__name__}: {_reason(error)}")
    llm = LLM(**job["arguments"])
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    watch = Watch(scheduler)
    found: dict[str, Any] = {"state": STARTED, "facts": _facts(llm, config, job["model"]), "groups": _groups(scheduler)}
    _write(result, found)
    found["batches"] = {name: generate(llm, watch, batch) for name, batch in job["batches"].items()}
    pool = scheduler.kv_cache_manager.block_pool
    found |= {"preemptions": watch.preemptions, "blocks": pool.num_gpu_blocks, "free": pool.get_num_free_blocks()}
    _write(result, found | {"state": FINISHED})
    llm.llm_engine.engine_core.shutdown()


def _reason(error: Exception) -> str:
    """The line that says something: validators put theirs after a heading."""
    listed = getattr(error, "errors", None)
    told = str(listed()[0]["msg"]).removeprefix("Value error, ") if callable(listed) else str(error)
    return " ".join(told.split())


def _write(path: Path, content: dict[str, Any]) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content), encoding="utf-8")
    partial.replace(path)


if __name__ == "__main__":
    run(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), Path(sys.argv[2]))
