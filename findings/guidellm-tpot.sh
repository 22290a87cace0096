#!/usr/bin/env bash
# Expected: the TPOT that guidellm's reports show is the time per token after the first, as in vLLM's and SGLang's
# benchmarks, and the same quantity that its own goodput objective tpot_ms is about.
# Seen with guidellm 0.8.1 on 2026-11-27: time_per_output_token_ms, which the columns and plots named TPOT are made of,
# divides by the tokens everything from the sending of the request on, the wait for the first token included (its
# docstring says so). The objective tpot_ms is compared with inter_token_latency_ms, so 20 ms is met at a TPOT of 109.
# It matters because with long prompts, which KV caches are trimmed for, this TPOT is mostly prefill and queueing: what
# trimming does to decoding drowns in it, and two tools disagree tenfold about the same answer.
# Seen: first token after 10 s, then 100 at 10 ms each: TPOT 108.9 ms, inter-token latency 10.0 ms, tpot_ms=20 met.
set -euo pipefail
export OMP_NUM_THREADS=1
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
python="$folder/venv/bin/python"
"$python" -m pip install --quiet --disable-pip-version-check guidellm==0.8.1 torch==2.13.0 transformers==5.19.0

cat > "$folder/recorded" <<'END'
first token after 0.01 s, then 100 at 10 ms each: expected TPOT 10.0 ms; time_per_output_token_ms 10.0, inter_token_latency_ms 10.0, objective tpot_ms=20 met: True
first token after 1 s, then 100 at 10 ms each: expected TPOT 10.0 ms; time_per_output_token_ms 19.8, inter_token_latency_ms 10.0, objective tpot_ms=20 met: True
first token after 10 s, then 100 at 10 ms each: expected TPOT 10.0 ms; time_per_output_token_ms 108.9, inter_token_latency_ms 10.0, objective tpot_ms=20 met: True
END

"$python" - > "$folder/seen" <<'END'
import sys
from importlib.metadata import version

from guidellm.schemas import GenerativeRequestStats, RequestInfo, RequestTimings, UsageMetrics
from guidellm.schemas.benchmark.goodput import GoodputSLO

print("guidellm", version("guidellm"), file=sys.stderr)
for wait in (0.01, 1.0, 10.0):
    tokens, step = 101, 0.01
    first = 1000 + wait
    last = first + (tokens - 1) * step
    request = GenerativeRequestStats(
        request_id="made-up",
        info=RequestInfo(
            request_id="made-up",
            status="completed",
            timings=RequestTimings(
                request_start=1000, first_token_iteration=first, last_token_iteration=last, request_end=last
            ),
        ),
        input_metrics=UsageMetrics(text_tokens=10),
        output_metrics=UsageMetrics(text_tokens=tokens),
    )
    met = GoodputSLO(tpot_ms=20).is_conforming(
        ttft_ms=request.time_to_first_token_ms, tpot_ms=request.inter_token_latency_ms, e2el_ms=None
    )
    print(
        f"first token after {wait:g} s, then {tokens - 1} at 10 ms each: expected TPOT 10.0 ms; "
        f"time_per_output_token_ms {request.time_per_output_token_ms:.1f}, "
        f"inter_token_latency_ms {request.inter_token_latency_ms:.1f}, objective tpot_ms=20 met: {met}"
    )
END
cat "$folder/seen"
if diff "$folder/recorded" "$folder/seen"; then
  echo "as recorded"
else
  echo "the behaviour changed" >&2
  exit 1
fi
