"""Measure models/pocket: `python scripts/evaluate_pocket.py [--write-card]`.

Exercises come from kvprofile.questions.tasks under the purpose "card", which training never uses. An answer counts when
every token, the end mark included, is the model's first choice given the ones before it, which is what greedy decoding
would write. Heads are ablated by trimming them to sinks and a window after the context, as a budget would.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from kvprofile.budget.profile import Matrix
from kvprofile.budget.trim import TrimRule
from kvprofile.checkpoint import describe, locate
from kvprofile.evaluate.simulate import Simulation, simulating
from kvprofile.files import write_atomically
from kvprofile.questions.tasks import Exercise, exercise
from kvprofile.scoring.prompts import Frame, chat_frame, encode
from kvprofile.statistics import bootstrap_mean, wilson

ROOT = Path(__file__).resolve().parents[1]
CARD = Path(__file__).with_name("pocket_card.md.jinja")

FACTS = ("needle", "multi_key", "lookup", "variables", "functions", "prose")
OTHERS = ("multi_value", "counting")
QUESTIONS = 8
ABLATION_TASKS = ("needle", "multi_key", "prose")


@dataclass(frozen=True)
class Prompt:
    """An exercise as ids: the context, and question and answer of every turn."""

    exercise: Exercise
    context: tuple[int, ...]
    turns: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]


class Maker:
    """Makes prompts of a task for one tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer, self.frame = tokenizer, chat_frame(tokenizer)
        self.end = (int(tokenizer.eos_token_id),)

    def measure(self, text: str) -> int:
        """Tokens of a text."""
        return len(encode(self.tokenizer, text))

    def prompts(self, task: str, count: int, tokens: int, questions: int = QUESTIONS) -> Iterator[Prompt]:
        """``count`` exercises with contexts of about ``tokens``."""
        for seed in range(count):
            made = exercise(task, "card", seed, tokens, questions, self.measure)
            context = (*self.frame.prefix_ids, *encode(self.tokenizer, made.context))
            yield Prompt(made, context, tuple(self._turns(made, self.frame)))

    def _turns(self, made: Exercise, frame: Frame) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
        for turn, question in enumerate(made.questions):
            later = made.conversation and turn > 0
            opening = frame.prefix_ids if later else ()
            asked = encode(self.tokenizer, question.text if later else "\n\n" + question.text)
            yield (*opening, *asked, *frame.suffix_ids), (*encode(self.tokenizer, question.answer), *self.end)


def hits(simulation: Simulation, prompt: Prompt) -> list[list[bool]]:
    """For every turn, which answer tokens are the first choice; the context is prefilled and trimmed already."""
    if prompt.exercise.conversation:
        branch = simulation.start()
        return [_right(branch.read([(*asked, *answer)])[0], asked, answer) for asked, answer in prompt.turns]
    branch = simulation.start(len(prompt.turns))
    logits = branch.read([(*asked, *answer) for asked, answer in prompt.turns])
    return [_right(found, *turn) for found, turn in zip(logits, prompt.turns, strict=True)]


def _right(logits: torch.Tensor, asked: Sequence[int], answer: Sequence[int]) -> list[bool]:
    choice = logits[len(asked) - 1 : len(asked) + len(answer) - 1].argmax(-1).cpu()
    return (choice == torch.tensor(answer)).tolist()


def full_cache(simulation: Simulation, prompts: Iterator[Prompt]) -> list[list[list[bool]]]:
    """Hits of every prompt, turn and token with every head full."""
    found = []
    for prompt in prompts:
        simulation.prefill(prompt.context)
        simulation.trim()
        found.append(hits(simulation, prompt))
    return found


def share(found: list[list[list[bool]]], first_turn: int = 0) -> dict[str, Any]:
    """Questions answered exactly, with a Wilson interval and one that knows which questions share a context."""
    exact = [[float(all(turn)) for turn in turns[first_turn:]] for turns in found if len(turns) > first_turn]
    total, right = sum(map(len, exact)), int(sum(map(sum, exact)))
    return {"exact": right / total, "questions": total, "wilson_95": wilson(right, total),
            "bootstrap_95": bootstrap_mean(exact)}  # fmt: skip


def tokens_right(found: list[list[list[bool]]]) -> dict[str, Any]:
    """Share of tokens right in repeated contexts, with a bootstrap over contexts."""
    by_context = [[float(hit) for hit in turns[0]] for turns in found]
    flat = [hit for row in by_context for hit in row]
    return {"tokens_right": sum(flat) / len(flat), "contexts": len(found), "bootstrap_95": bootstrap_mean(by_context)}


def ablate(simulation: Simulation, maker: Maker, count: int, tokens: int) -> dict[str, Any]:
    """Exact answers when single heads, and pairs in one layer, keep only sinks and window after the context."""
    layers, kv_heads = simulation.geometry.layers, simulation.geometry.kv_heads
    singles = [((layer, head),) for layer in range(layers) for head in range(kv_heads)]
    pairs = [((l, a), (l, b)) for l in range(layers) for a, b in itertools.combinations(range(kv_heads), 2)]  # noqa: E741
    every = tuple(itertools.product(range(layers), range(kv_heads)))
    cases = [(), *singles, *pairs, every]
    exact: dict[Any, list[bool]] = {case: [] for case in cases}
    repeated: dict[Any, list[bool]] = {case: [] for case in cases}
    for task in (*ABLATION_TASKS, "repeat"):
        into = repeated if task == "repeat" else exact
        for prompt in maker.prompts(task, count, tokens):
            simulation.prefill(prompt.context)
            for case in cases:
                simulation.trim(_without(case, layers, kv_heads))
                for turn in hits(simulation, prompt):
                    into[case] += turn if task == "repeat" else [all(turn)]

    def mean(found: list[bool]) -> float:
        return sum(found) / len(found)

    return {
        "questions": len(exact[()]),
        "context_tokens": tokens,
        "none": {"exact": mean(exact[()]), "repeat": mean(repeated[()])},
        "all": {"exact": mean(exact[every]), "repeat": mean(repeated[every])},
        "singles": [[{"exact": mean(exact[((l, h),)]), "repeat": mean(repeated[((l, h),)])} for h in range(kv_heads)]
                    for l in range(layers)],  # noqa: E741
        "pairs": [{"layer": p[0][0], "heads": [p[0][1], p[1][1]], "exact": mean(exact[p]), "repeat": mean(repeated[p])}
                  for p in pairs],
    }  # fmt: skip


def _without(case: Sequence[tuple[int, int]], layers: int, kv_heads: int) -> Matrix:
    return [[float((layer, head) not in case) for head in range(kv_heads)] for layer in range(layers)]


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Every figure of the model card."""
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    description = describe(locate(str(arguments.model)))
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    maker, geometry, count = Maker(tokenizer), description.geometry, arguments.contexts
    every: Matrix = [[1.0] * geometry.kv_heads] * geometry.layers
    with simulating(model, geometry, every, TrimRule(arguments.sinks, arguments.window, 1)) as simulation:

        def asked(task: str, tokens: int, contexts: int = count) -> list[list[list[bool]]]:
            return full_cache(simulation, maker.prompts(task, contexts, tokens))

        by_task = {task: asked(task, 2000) for task in (*FACTS, *OTHERS)}
        result: dict[str, Any] = {
            "facts": share([prompt for task in FACTS for prompt in by_task[task]]),
            "by_task": {task: share(found) for task, found in by_task.items()},
            "facts_3600": share([prompt for task in FACTS for prompt in asked(task, 3600, max(1, count // 5))]),
            "repeat": tokens_right(asked("repeat", 1000)),
            "strings": tokens_right(asked("strings", 500)),
            "later_turns": share(asked("multi_turn", 1000), first_turn=1),
            "persona": share(asked("persona", 1000)),
            "sinks": arguments.sinks,
            "window": arguments.window,
        }
        result["ablation"] = ablate(simulation, maker, max(1, count // 5), 800)
    parts = parts_of(json.loads((arguments.model / "training.json").read_text()))
    tokens = sum(stage["steps"] * stage["rows"] * stage["row_tokens"] for part in parts for stage in part["plan"])
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return {**result, "training": parts, "shape": parts[0]["shape"], "tokens": tokens, "parameters": parameters}


def parts_of(record: dict[str, Any]) -> list[dict[str, Any]]:
    """The runs of scripts/train_pocket.py that made a checkpoint, first to last."""
    return [*(parts_of(record["start"]) if "start" in record else []), record]


def card(result: dict[str, Any]) -> str:
    """The model card: what the checkpoint is, how it was made, and the figures just measured."""
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)  # noqa: S701 - Markdown
    template = environment.from_string(CARD.read_text(encoding="utf-8"))
    return template.render(
        **result,
        fact_tasks=FACTS,
        other_tasks=OTHERS,
        pairs=list(itertools.combinations(range(result["shape"]["kv_heads"]), 2)),
        matters=list(matters(result["ablation"])),
        percent=rounded_down,
    )


def matters(ablation: dict[str, Any]) -> Iterator[str]:
    """The single heads whose ablation costs a point or more of answers or of repeated tokens, as 'KV 0 of layer 2'."""
    none = ablation["none"]
    for layer, row in enumerate(ablation["singles"]):
        for head, cell in enumerate(row):
            if max(none["exact"] - cell["exact"], none["repeat"] - cell["repeat"]) >= 0.01:
                yield f"KV {head} of layer {layer}"


def rounded_down(share: float, digits: int = 1) -> str:
    """A share as a percentage that never looks better than it is."""
    scale = 10**digits
    return f"{math.floor(round(share * 100 * scale, 6)) / scale:.{digits}f}%"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", type=Path, default=ROOT / "models" / "pocket")
    parser.add_argument("--contexts", type=int, default=30, help=f"contexts a task, {QUESTIONS} questions each at most")
    parser.add_argument("--sinks", type=int, default=16)
    parser.add_argument("--window", type=int, default=64)
    parser.add_argument("--write-card", action="store_true", help="write the figures into the model's README.md")
    arguments = parser.parse_args()
    result = measure(arguments)
    print(json.dumps(result, indent=2))
    if arguments.write_card:
        write_atomically(arguments.model / "README.md", card(result).encode())


if __name__ == "__main__":
    main()
