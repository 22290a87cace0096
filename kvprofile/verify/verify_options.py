"""What can be asked of a verification: every option once, with its type, its default, its name and its help.

Options of the engine are called as vLLM calls them. What decides which budgets are served is read from the plugin's own
variables where no option says otherwise, so a serving environment verifies what it serves.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from kvprofile.scoring import vllm_argument

OURS = frozenset(
    {
        "enable_prefix_caching",
        "kv_cache_memory_bytes",
        "max_num_batched_tokens",
        "max_num_seqs",
        "model",
        "num_gpu_blocks_override",
        "served_model_name",
        "skip_tokenizer_init",
        "trust_remote_code",
    }
)
"""Arguments of ``vllm.LLM`` that the procedure sets itself."""


@dataclass(frozen=True)
class EngineChoice:
    """How the engines are started: as they will serve. None leaves the choice to vLLM."""

    dtype: Annotated[str, typer.Option(help="As vLLM's.")] = "auto"
    block_size: Annotated[int | None, typer.Option(help="As vLLM's: tokens of a block.", min=1)] = None
    tensor_parallel_size: Annotated[int, typer.Option(help="As vLLM's: ranks of an engine.", min=1)] = 1
    kv_cache_dtype: Annotated[str, typer.Option(help="As vLLM's.")] = "auto"
    max_model_len: Annotated[
        int | None,
        typer.Option(
            help="As vLLM's, and the longest request that is tried; chosen by sinks and window unless given.",
            min=1,
        ),
    ] = None
    enforce_eager: Annotated[bool, typer.Option("--enforce-eager", help="As vLLM's: no graphs.")] = False
    gpu_memory_utilization: Annotated[
        float | None,
        typer.Option(help="As vLLM's; the pool is made small all the same, so that requests are preempted."),
    ] = None
    attention_backend: Annotated[str | None, typer.Option(help="As vLLM's.")] = None
    vllm_arg: Annotated[
        tuple[str, ...],
        typer.Option("--vllm-arg", help="Another argument of vllm.LLM, NAME=VALUE; repeatable."),
    ] = ()

    def arguments(self) -> dict[str, Any]:
        """Arguments of ``vllm.LLM``. Raises InputError for one that makes no sense here."""
        found: dict[str, Any] = {
            "dtype": self.dtype,
            "tensor_parallel_size": self.tensor_parallel_size,
            "kv_cache_dtype": self.kv_cache_dtype,
            "enforce_eager": self.enforce_eager,
        }
        for name in ("block_size", "gpu_memory_utilization", "attention_backend"):
            value = getattr(self, name)
            if value is not None:
                found[name] = value
        return found | dict(vllm_argument.parse(text, OURS, "load_format=safetensors") for text in self.vllm_arg)


@dataclass(frozen=True)
class VerifyOptions:
    """What a user asked for."""

    model: Annotated[str, typer.Argument(help="A checkpoint folder or a hub id.")]
    profile: Annotated[
        Path | None,
        typer.Option(help="Budget file or runtime file; LLM_KVZIP_BUDGET or that of the model unless given."),
    ] = None
    retention: Annotated[
        float | None,
        typer.Option(help="Of a budget file; LLM_KVZIP_RETENTION or 0.5 unless given.", min=0, max=1),
    ] = None
    kind: Annotated[
        tuple[str, ...],
        typer.Option(
            help="whole or graded heads; repeatable; LLM_KVZIP_KIND unless given, or graded where the file has a probe."
        ),
    ] = ()
    engine: EngineChoice = EngineChoice()
    seed: Annotated[int, typer.Option(help="Seed of the prompts.", min=0)] = 0
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")] = None
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that the checkpoint brings.")
    ] = False
    output: Annotated[
        Path | None, typer.Option(help="File of the attestation; next to the budget file unless given.")
    ] = None
