"""Runs in a process of its own: scores documents on one vLLM engine after the other, in this process.

Reads a job as JSON from stdin; writes each case's token scores to a file and prints ``RESULT`` and what was noticed.
"""

from __future__ import annotations

import json
import random
import sys

import torch
from safetensors.torch import save_file


def vllm_attributes(llm):
    """Instance attributes of every object that a session may touch, and whether its functions are vLLM's own."""
    worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    layers = list(worker.vllm_config.compilation_config.static_forward_context.values())
    own = [getattr(layer.impl.forward, "__func__", None) is type(layer.impl).forward for layer in layers]
    own.append(getattr(worker.execute_model, "__func__", None) is type(worker).execute_model)
    return {
        "own": all(own),
        "layers": [sorted(vars(layer.impl)) for layer in layers],
        "worker": sorted(vars(worker)),
    }


def score(case):
    from kvprofile.capture.session import Session
    from kvprofile.scoring.prompts import Frame, FramedDocument
    from kvprofile.scoring.session_scorer import SessionScorer
    from kvprofile.scoring.vllm_engine import started

    frame = Frame(**{name: tuple(v) if isinstance(v, list) else v for name, v in case["frame"].items()})
    notes, tensors = {}, {}
    with started(case["engine"]) as llm:
        look = case.get("look")
        before = vllm_attributes(llm) if look else None
        with Session(llm) as session:
            during = vllm_attributes(llm) if look else None
            cached = []
            read = session.read

            def noting(ids, mark=None, **options):
                cached.append([len(ids), read(ids, mark, **options), bool(options.get("fresh"))])
                return cached[-1][1]

            session.read = noting
            stranger = random.Random(7)

            def disturb(_):
                """Another user of the engine, whose request fills the pool."""
                if case.get("disturb"):
                    read([stranger.randrange(4, 1000) for _ in range(case["disturb"])], salt="stranger")

            options = {"chunk_tokens": case["chunk_tokens"], "request_tokens": case.get("request_tokens", 8192)}
            scorer = SessionScorer(session, frame, advance=disturb, **options)
            for index, (name, prefix, context) in enumerate(case["documents"]):
                document = FramedDocument(name, tuple(prefix), tuple(context))
                found = [scored.token_scores for scored in scorer.score(document, f"document-{index}")]
                tensors[f"{index}"] = torch.cat(found, -1)
            notes = {
                "evictions": scorer.evictions,
                "shortcuts": scorer.shortcuts,
                "cached": cached,
                "layers": session.layers,
                "backends": session.backends,
                "block_tokens": session.block_tokens,
            }
        after = vllm_attributes(llm) if look else None
        notes |= {"before": before, "during": during, "after": after}
    save_file(tensors, case["output"])
    return notes


def main():
    for case in json.load(sys.stdin):
        print("RESULT", json.dumps(score(case)), flush=True)


if __name__ == "__main__":
    main()
