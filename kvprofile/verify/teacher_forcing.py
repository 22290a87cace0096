"""The simulation reads what an engine has written, and says how likely it finds each token.

A request that was preempted begins again with what it had written, in full, so each of its lives is simulated apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from kvprofile.budget.float8 import of_cache
from kvprofile.budget.probe import Probe
from kvprofile.budget.trim import GRADED, WHOLE, TrimRule
from kvprofile.checkpoint import Description, load_model, place
from kvprofile.evaluate.simulate import Simulation, simulating
from kvprofile.evaluate.token_choice import ByProbe
from kvprofile.verify.child_process import EngineRun
from kvprofile.verify.comparison import TO_SIMULATION, Compared, rounding_of
from kvprofile.verify.request_plan import RequestPlan


class SimulatedModel:
    """A checkpoint on transformers, on the device and in the dtype of the engine, loaded once."""

    def __init__(self, description: Description, dtype: str, platform: str, plan: RequestPlan) -> None:
        device = "cpu" if platform == "cpu" else "auto"
        placement = place(description, dtype, device, plan.max_model_len)
        self.description, self.reasons = description, placement.reasons
        self.model = load_model(description, placement)
        self.model.set_attn_implementation("sdpa")

    def compare(
        self,
        plan: RequestPlan,
        run: EngineRun,
        heads: Sequence[Sequence[float | None]],
        rule: TrimRule,
        probe: Probe | None,
    ) -> Compared:
        """Every token that an engine served against its log-probability under the budget [L][G]."""
        found = Compared(TO_SIMULATION[GRADED if probe is not None else WHOLE][rounding_of(run.facts)])
        choice = ByProbe(probe) if probe is not None else None
        outputs, v2 = run.outputs(), run.facts["model_runner"] == "V2"
        with simulating(
            self.model,
            self.description.geometry,
            [list(row) for row in heads],
            rule,
            choice,
            of_cache(str(run.facts["kv_cache_dtype"]), str(run.facts["platform"])),
        ) as simulation:
            for batch, request in plan.requests:
                output = outputs[request.name]
                for life in lives_of(request.prompt, output, v2 or choice is not None):
                    _compare_life(
                        simulation, request.prompt, output, life, f"request {request.name} of batch {batch}", found
                    )
        return found.close()


def lives_of(prompt: Sequence[int], output: Mapping[str, Any], at_admission: bool) -> list[tuple[int, int, int]]:
    """(tokens prefilled, position of its first new token, position after its last) of each life of a request.

    Rows are trimmed from where the request was admitted on. On model runner V1 rows of whole heads are, too, where the
    last written tokens of a resumed request are computed one by one; a life in which a chunk comes after those cannot
    be simulated and is left out.
    """
    ends = [*(life["tokens"] for life in output["lives"][1:]), len(prompt) + len(output["tokens"])]
    found = []
    for life, end in zip(output["lives"], ends, strict=True):
        prefilled = life["tokens"]
        if not at_admission:
            singles = [start for start, count in life["chunks"] if count == 1 and len(prompt) <= start < life["tokens"]]
            if singles:
                prefilled = singles[0]
                if any(count > 1 for start, count in life["chunks"] if prefilled <= start < life["tokens"]):
                    continue
        found.append((prefilled, life["tokens"], end))
    return found


@torch.inference_mode()
def _compare_life(
    simulation: Simulation,
    prompt: Sequence[int],
    output: Mapping[str, Any],
    life: tuple[int, int, int],
    where: str,
    found: Compared,
) -> None:
    """Take in the tokens of one life. One that the simulation would not have chosen is a near tie, or too far apart."""
    prefilled, first, end = life
    tokens = [*prompt, *output["tokens"]]
    logits = [simulation.prefill(tokens[:prefilled])[None]]
    simulation.trim(prompt_tokens=len(prompt))
    simulation.forget_context()
    if end - 1 > prefilled:
        logits.append(simulation.start().read([tokens[prefilled : end - 1]])[0].float())
    rows = torch.cat(logits).log_softmax(-1)[first - prefilled : end - prefilled]
    written = torch.tensor(tokens[first:end], device=rows.device)
    likely = rows.gather(1, written[:, None])[:, 0].tolist()
    best = rows.max(-1).values.tolist()
    for offset, (said, top) in enumerate(zip(likely, best, strict=True)):
        at = f"{where}, token {first + offset}"
        if not found.note(at, output["logprobs"][first + offset - len(prompt)], said):
            continue
        if top - said > found.margins.most:
            found.far.append(f"{at}: the simulation finds another {top - said:.3g} nats more likely")
        else:
            found.near_ties += top > said
