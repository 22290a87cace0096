"""The ``vllm.general_plugins`` entry point: a short gate in front of everything else. Standard library only.

vLLM calls it in every process, sometimes more than once. Unless ``LLM_KVZIP_ENABLED=1`` it returns at once, having
imported nothing and touched nothing.
"""

from __future__ import annotations

import os

from kvprofile.environment import budgets_wanted


def register() -> None:
    """Install the runtime in this process if it is asked for.

    Raises ValueError for settings that make no sense and for releases of vLLM that were not tested.
    """
    if not budgets_wanted(os.environ):
        return
    import vllm

    from kvprofile.runtime import settings

    asked = settings.from_environment(os.environ)
    settings.require_tested(vllm.__version__, asked)
    from kvprofile.runtime import patches

    patches.install(poison=asked.poison)
