"""Runs in a process of its own: VLLMClient with an engine in this process, and GPUMemoryManager beside it."""

from __future__ import annotations

import json
import sys

from kvprofile.bench.attention_pass import TIMER
from kvprofile.bench.documents import pocket
from kvprofile.client import VLLMClient
from kvprofile.instrumentation import GPUMemoryManager


def main():
    options = {"dtype": "float32", "max_model_len": 4096, "enforce_eager": True, "block_size": 32}
    options |= {"worker_extension_cls": TIMER, "kv_cache_memory_bytes": 2**26}
    found = {"answers": []}
    with VLLMClient(sys.argv[1], enable_prefix_caching=False, **options) as client:
        llm = client.source
        found["timed_layers"] = llm.collective_rpc("start_attention_timer")
        scheduler = llm.llm_engine.engine_core.engine_core.scheduler
        pool = scheduler.kv_cache_manager.block_pool
        stock, seen = scheduler.schedule, []
        manager = GPUMemoryManager(llm)

        def schedule(*args):
            """Compare after each step what the manager sees with the pool itself, at the same moment."""
            output = stock(*args)
            if output.num_scheduled_tokens:
                held = pool.num_gpu_blocks - 1 - pool.get_num_free_blocks()
                seen.append([len(seen), held])
            return output

        scheduler.schedule = schedule
        for document in pocket(0)[:2]:
            question = document.questions[0]
            content = f"{document.text}\n\n{question.text}"
            answer = client.generate_response(
                messages=[{"role": "user", "content": content}], max_tokens=24, temperature=0
            )
            look = manager.sample()
            found["answers"].append(
                {
                    "text": answer.text,
                    "expected": list(question.expected),
                    "input_tokens": answer.input_tokens,
                    "output_tokens": answer.output_tokens,
                    "timings": vars(answer.timings),
                    "cache": vars(answer.cache),
                    "eviction_ratio": answer.eviction_ratio,
                    "held_at_last_step": seen[-1][1],
                    "look": vars(look),
                }
            )
        found["decode_steps"] = [ms for decodes, ms in llm.collective_rpc("attention_steps")[0] if decodes]
        found["blocks"] = pool.num_gpu_blocks
        found["held_after"] = pool.num_gpu_blocks - 1 - pool.get_num_free_blocks()
        prefix = client.generate_response("The old archive", max_tokens=1)
        found["short"] = {"output_tokens": prefix.output_tokens, "cache": vars(prefix.cache)}
    print("RESULT", json.dumps(found))


if __name__ == "__main__":
    main()
