"""The model runners and schedulers that a test of a whole engine is run on.

What CPUs take is model runner V1. V2, which GPUs take, is interpreted here (``interpreter``), several times slower, so
its tests are slow ones and ask less. Left out on V2, besides what needs no engine at all:

- freed blocks are not poisoned: V2's workers would take the marks of freed blocks for other blocks, and the plugin
  refuses that. Reading one shows all the same, because other tokens than the simulation's come out;
- torch.compile: what it compiles is the model's code, which both runners share;
- layers that keep a state: with Triton vLLM takes other kernels for them, which no engine here was compared with.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from tests.vllm import as_asked, interpreter
from tests.vllm.engine import environment


@dataclass(frozen=True)
class Runner:
    """A model runner with a scheduler: what the environment says for it, and arguments of its engine."""

    name: str
    settings: dict
    arguments: dict = field(default_factory=dict)

    @property
    def v2(self):
        return interpreter.WANTED in self.settings

    @property
    def asynchronous(self):
        return self.arguments.get("async_scheduling", False)

    def environment(self, budget=None, **settings):
        own = {} if budget is None and not self.v2 else self.settings
        return environment(budget, **own | settings)

    def some(self, count):
        """So many where V1 runs, a part of it on V2."""
        return -(-count // 3) if self.v2 else count


POISON, INTERPRETED = {"LLM_KVZIP_POISON": "1"}, {interpreter.WANTED: "1"}
ASKED, ASYNC = {as_asked.WANTED: "1"}, {"async_scheduling": True}

V1, V2 = Runner("v1", POISON), Runner("v2", INTERPRETED)
V1_ASYNC, V2_ASYNC = Runner("v1-async", POISON | ASKED, ASYNC), Runner("v2-async", INTERPRETED | ASKED, ASYNC)

WHERE_TRITON_IS = pytest.mark.skipif(not interpreter.is_here(), reason=interpreter.MISSING)


def on(*runners):
    """Parametrise a test with runners; all but V1 without async scheduling are slow."""

    def marks(runner):
        return [pytest.mark.slow] * (runner is not V1) + [WHERE_TRITON_IS] * runner.v2

    return pytest.mark.parametrize("runner", [pytest.param(each, id=each.name, marks=marks(each)) for each in runners])
