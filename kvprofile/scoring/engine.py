"""What can run a model for a profile, and which of them does. Each engine gives the scores of ``scoring.attention``."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Protocol

from kvprofile.errors import InputError
from kvprofile.scoring.methods import METHODS

if TYPE_CHECKING:
    from kvprofile.checkpoint import Description
    from kvprofile.progress import Progress
    from kvprofile.scoring.chunk_store import ChunkStore
    from kvprofile.scoring.plan import ScoringPlan

ENGINES = ("auto", "hf", "vllm")


class Engine(Protocol):
    """Runs a model over the documents of a plan. ``dtype`` and ``device`` are those that the file records."""

    name: str

    @property
    def dtype(self) -> str:
        """Of weights and activations."""

    @property
    def device(self) -> str:
        """Its kind: cpu, cuda."""

    @property
    def reasons(self) -> tuple[str, ...]:
        """Its choices, each with its reason."""

    def facts(self) -> dict[str, object]:
        """What scores depend on besides the plan; another run with the same facts may use finished chunks."""

    def score(self, plan: ScoringPlan, store: ChunkStore, progress: Progress, keep_token_scores: bool) -> str:
        """Score what the store does not hold yet. Gives the attention kernel used, with the reason."""


def check_engine(asked: str, method: str) -> None:
    """Raise InputError where the engine asked for is unknown, not installed, or cannot do the method."""
    if asked not in ENGINES:
        raise InputError(f"unknown engine {asked!r}; known: {', '.join(ENGINES)}")
    if asked == "vllm" and METHODS[method].needs_modules:
        what = "output projections" if METHODS[method].weighs else "gradients or gates"
        raise InputError(f"--method {method} needs {what}, which --engine vllm does not have; use hf")
    if asked == "vllm" and not vllm_is_installed():
        raise InputError("--engine vllm needs vLLM, which is not installed here")


def choose_engine(asked: str, description: Description, method: str) -> tuple[str, str]:
    """'hf' or 'vllm', and why. Raises InputError as ``check_engine``, and where the model does not go with either."""
    check_engine(asked, method)
    states = description.keeps_states
    if states and METHODS[method].loss_aware:
        raise InputError(
            f"--method {method} does not run {description.source.name}, some layers of which keep a state (linear "
            "attention, Mamba, convolutions); use kvzip or kvzip-mean"
        )
    if states and asked == "vllm":
        raise InputError(
            f"--engine vllm does not run {description.source.name}, some layers of which keep a state (linear "
            "attention, Mamba, convolutions); use hf"
        )
    if asked == "vllm" and description.source.gguf:
        raise InputError(f"--engine vllm does not run {description.source.gguf}; leave it out, or give the checkpoint")
    if asked != "auto":
        return asked, f"engine {asked}: asked for"
    found = description.quantisation
    quantisation = found.method if found else None
    if found and found.multiplied_out:
        return "hf", f"engine hf: multiplies out the weights ({quantisation})"
    if quantisation and states:
        return "hf", f"engine hf: the weights are quantised ({quantisation}), but some layers keep a state"
    if quantisation and METHODS[method].needs_modules:
        what = "output projections" if METHODS[method].weighs else "gradients"
        return "hf", f"engine hf: the weights are quantised ({quantisation}), but --method {method} needs {what}"
    if quantisation and not vllm_is_installed():
        return "hf", f"engine hf: the weights are quantised ({quantisation}), but vLLM is not installed here"
    if quantisation:
        return "vllm", f"engine vllm: the weights are quantised ({quantisation}), and vLLM runs them as they are served"
    return "hf", "engine hf: exact on any machine, and has every method; --engine vllm profiles what vLLM serves"


def vllm_is_installed() -> bool:
    """Whether vLLM could be imported, without the seconds that importing takes."""
    return importlib.util.find_spec("vllm") is not None
