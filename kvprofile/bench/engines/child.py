"""Becomes vLLM's server, and ends when the benchmark that started it ends, however that happens. Linux's own way.

Runs as ``python -m kvprofile.bench.engines.child PARENT_PID MODULE ARGUMENTS...``. Standard library only.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Ask for SIGTERM when the parent is gone, then run the module in this very process."""
    parent, module, *arguments = sys.argv[1:]
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != int(parent):  # it went before that was asked for
            sys.exit(1)
    os.execv(sys.executable, [sys.executable, "-m", module, *arguments])  # noqa: S606 - what is asked for keeps that


if __name__ == "__main__":
    main()
