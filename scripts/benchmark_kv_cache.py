"""The experiment plan that the project began with, in one command: `python scripts/benchmark_kv_cache.py MODEL`.

Baseline, retentions 0.9, 0.7 and 0.5, and a remote provider, over three documents. The work is in ``kvprofile.bench``;
this is `kvprofile bench --preset seed`, and further options go to it: `--dry-run` first, then `--provider moonshot`.
"""

from __future__ import annotations

import sys

from kvprofile.cli import main

if __name__ == "__main__":
    model = [] if len(sys.argv) < 2 or sys.argv[1].startswith("-") else ["--model", sys.argv[1]]
    main(["bench", "--preset", "seed", *model, *sys.argv[1 + len(model) // 2 :]])
