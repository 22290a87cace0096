"""A session on a running ``vllm.LLM``: marked requests go in, what the workers found of them comes out."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Any

from kvprofile.capture import refuse
from kvprofile.capture.marks import Mark
from kvprofile.capture.merge import Captured, merge
from kvprofile.errors import InputError


def marked(parameters: Any, mark: Mark) -> Any:
    """A copy of ``vllm.SamplingParams`` whose request the workers of an open session follow."""
    parameters = parameters.clone()
    parameters.extra_args = {**(parameters.extra_args or {}), **mark.as_extra_args()}
    return parameters


class Session:
    """Workers of ``llm`` watch marked requests while it is open. One session for each engine at a time.

    ``layers`` are the indices of the layers with full attention, ``kv_heads`` is G, ``backends`` are the attention
    kernels' names. Opening raises InputError where the engine cannot be watched.
    """

    def __init__(self, llm: Any) -> None:
        self.llm = llm
        self.layers: tuple[int, ...] = ()
        self.backends: tuple[str, ...] = ()
        self.kv_heads = 0

    def __enter__(self) -> Session:
        config, facts = self.llm.llm_engine.vllm_config, []
        told = refuse.problems(config)
        if not told:
            facts = self.llm.collective_rpc("kvprofile_start")
            told = [fact["problem"] for fact in facts if "problem" in fact]
            if not told and not any(fact["layers"] for fact in facts):
                told = ["a model without full-attention layers"]
            if told:
                self._stop_others(facts)
        if told:
            raise InputError(f"kvprofile cannot look into this engine: {'; '.join(dict.fromkeys(told))}")
        self.block_tokens: int = config.cache_config.block_size
        self.layers = tuple(sorted({layer for fact in facts for layer in fact["layers"]}))
        self.backends = tuple(sorted({name for fact in facts for name in fact["backends"]}))
        self.kv_heads = facts[0]["kv_heads"]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.llm.collective_rpc("kvprofile_stop")
        except Exception:  # an engine that died has nothing to stop, and its own error says more
            if error is None:
                raise

    def read(self, ids: Sequence[int], mark: Mark | None = None, *, salt: str = "", fresh: bool = False) -> int:
        """Run one request to the end of its prefill. Gives how many of its tokens the prefix cache had.

        Requests share cached blocks where they have the same ``salt``; a ``fresh`` one reads no cache.
        """
        from vllm import SamplingParams

        options = SamplingParams(
            temperature=0.0, max_tokens=1, detokenize=False, ignore_eos=True, skip_reading_prefix_cache=fresh
        )
        if mark is not None:
            options = marked(options, mark)
        prompt: dict[str, Any] = {"prompt_token_ids": list(ids)}
        if salt:
            prompt["cache_salt"] = salt
        (output,) = self.llm.generate([prompt], [options], use_tqdm=False)
        return int(output.num_cached_tokens or 0)

    def take(self, mark: Mark) -> Captured:
        """What all workers found of a request that was read. Raises InputError where they could not look."""
        found = merge(self.llm.collective_rpc("kvprofile_take", args=(mark.key,)))
        if found.problems:
            raise InputError(f"kvprofile cannot look into this engine: {'; '.join(found.problems)}")
        return found

    def _stop_others(self, facts: Sequence[dict[str, Any]]) -> None:
        """Some ranks may watch already when another refuses; a session that was open before stays."""
        if any("problem" not in fact for fact in facts):
            self.llm.collective_rpc("kvprofile_stop")
