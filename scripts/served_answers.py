"""How long greedy answers served with budgets stay those of stock vLLM: `python -m scripts.served_answers`.

After `make real-model` and `make install-vllm`. Stock vLLM, whole heads at half of the cache and graded ones at less
answer the same questions about contexts of 1,500 to 6,000 tokens, greedily and in float32; what counts is the number
of tokens before the first that is not stock's. Prints the mean of each leg with its interval over contexts, and the
paired difference. Every leg is an engine in a process of its own; a leg that is finished is not served again.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kvprofile.budget.trim import GRADED, WHOLE
from kvprofile.checkpoint import describe, load_tokenizer, locate
from kvprofile.evaluate import evaluation
from kvprofile.evaluate.options import EvaluationOptions
from kvprofile.evaluate.variants import Contender
from kvprofile.files import document, write_atomically
from kvprofile.statistics import Bootstrap
from scripts.real_study import BLOCK, FACTS, MODEL, ROOT, SHIPPED, SINKS, WINDOW, estimate, shipped

CONTEXTS = ((1500, 4, 8), (3000, 2, 8), (6000, 1, 8))
"""Tokens, contexts of each of the four tasks, questions of each: 224 questions on 28 contexts."""
OUTPUT_TOKENS = 64
SEED = 7
RESULT = "RESULT "


@dataclass(frozen=True)
class Leg:
    """Stock vLLM, or budgets of a kind at a retention."""

    name: str
    kind: str | None = None
    retention: float = 1.0

    def environment(self) -> dict[str, str]:
        """Variables of the plugin."""
        if self.kind is None:
            return {}
        asked = {"ENABLED": 1, "BUDGET": SHIPPED, "KIND": self.kind, "RETENTION": self.retention, "SINK": SINKS}
        return {f"LLM_KVZIP_{name}": str(value) for name, value in {**asked, "RECENT": WINDOW}.items()}


STOCK = Leg("stock")
LEGS = (STOCK, Leg("whole 0.5", WHOLE, 0.5), Leg("graded 0.3", GRADED, 0.3), Leg("whole 0.3", WHOLE, 0.3))


@dataclass(frozen=True)
class Asked:
    """A question as ids, and the context that it is about."""

    context: str
    tokens: int
    ids: list[int]


def questions() -> list[Asked]:
    """Those of every context after each other, so that its prompt is processed once."""
    description = describe(locate(str(MODEL)))
    tokenizer = load_tokenizer(description.source)
    found = []
    for tokens, contexts, count in CONTEXTS:
        options = EvaluationOptions(
            retentions=(0.5,), tasks=FACTS, context_tokens=(tokens,), contexts=contexts, questions=count,
            sink_tokens=SINKS, recent_tokens=WINDOW, block_tokens=BLOCK, controls=False, only_outside=True, seed=SEED,
        )  # fmt: skip
        planned = evaluation.plan(description, tokenizer, [Contender("kvzip", shipped())], options)
        for asked in planned.asked:
            for number in range(len(asked.exercise.questions)):
                ids = [*asked.context_ids, *asked.prompt(number)]
                found.append(Asked(asked.name, len(asked.context_ids), ids))
    return found


def serve() -> None:
    """One leg, in its own process: prompts come as JSON, tokens go as JSON."""
    from vllm import LLM, SamplingParams

    prompts = json.load(sys.stdin)
    longest = max(map(len, prompts)) + OUTPUT_TOKENS
    engine = LLM(
        str(MODEL), skip_tokenizer_init=True, dtype="float32", block_size=BLOCK, max_model_len=longest, max_num_seqs=8,
        enforce_eager=True, kv_cache_memory_bytes=6 << 30,
    )  # fmt: skip
    options = SamplingParams(temperature=0, max_tokens=OUTPUT_TOKENS, detokenize=False)
    outputs = engine.generate([{"prompt_token_ids": ids} for ids in prompts], options, use_tqdm=False)
    print(RESULT + json.dumps([list(output.outputs[0].token_ids) for output in outputs]), flush=True)


def answers(leg: Leg, asked: list[Asked], folder: Path) -> list[list[int]]:
    """Tokens of every answer of a leg."""
    file = folder / f"{leg.name.replace(' ', '-')}.json"
    if not file.is_file():
        env = {name: value for name, value in os.environ.items() if not name.startswith("LLM_KVZIP_")}
        env |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1", **leg.environment()}
        command = [sys.executable, "-m", "scripts.served_answers", "--serve"]
        log = folder / f"{leg.name.replace(' ', '-')}.log"
        with log.open("w") as errors:
            run = subprocess.run(  # noqa: S603 - this program
                command, input=json.dumps([each.ids for each in asked]), env=env, cwd=ROOT, stdout=subprocess.PIPE,
                stderr=errors, text=True, check=False,
            )  # fmt: skip
        lines = [line for line in run.stdout.splitlines() if line.startswith(RESULT)]
        if not lines:
            sys.exit(f"{leg.name} failed, see {log}")
        write_atomically(file, lines[0].removeprefix(RESULT).encode())
    found: list[list[int]] = json.loads(file.read_text())
    return found


def common(ours: list[int], theirs: list[int]) -> int:
    """Tokens before the first difference; an end counts as a token of its own."""
    pairs = zip([*ours, -1], [*theirs, -1], strict=False)
    return next((place for place, (one, other) in enumerate(pairs) if one != other), len(theirs))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "served-answers", help="where answers are kept")
    parser.add_argument(
        "--output", type=Path, default=ROOT / "docs" / "studies" / "data" / "served-answers.json", help="the figures"
    )
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve()
        return
    arguments.runs.mkdir(parents=True, exist_ok=True)
    asked = questions()
    bootstrap = Bootstrap([each.context for each in asked])
    stock = answers(STOCK, asked, arguments.runs)
    lengths: dict[str, Any] = {}
    rows = []
    for leg in LEGS[1:]:
        found = answers(leg, asked, arguments.runs)
        lengths[leg.name] = np.array([[common(*pair) for pair in zip(found, stock, strict=True)]], dtype=np.float64)
        same = np.array([[float(one == other) for one, other in zip(found, stock, strict=True)]])
        row = {
            "leg": leg.name,
            "kept": estimate(bootstrap.mean(lengths[leg.name])),
            "same": estimate(bootstrap.mean(same)),
        }
        row["less_whole_half"] = estimate(bootstrap.mean(lengths[leg.name] - lengths[LEGS[1].name]))
        rows.append(row)
        print(json.dumps(row), flush=True)
    figures = {
        "model": MODEL.name, "questions": len(asked), "contexts": len({each.context for each in asked}),
        "context_tokens": sorted({each.tokens for each in asked}), "stock_tokens": float(np.mean([*map(len, stock)])),
        "rows": rows,
    }  # fmt: skip
    write_atomically(arguments.output, document(figures))


if __name__ == "__main__":
    main()
