"""A short soak of the trimmed vLLM, and the proof that its accounts see leaks and wrong outputs."""

from __future__ import annotations

import pytest

from tests.vllm.soak import soak

pytest.importorskip("vllm")
pytestmark = [pytest.mark.slow, pytest.mark.vllm]

PLANTED = """
import sys
from tests.vllm import soak
from kvprofile.runtime import backend
from kvprofile.runtime import stream_cache

Manager = stream_cache.StreamManager
remove, pop = Manager._remove_blocks_in_range, Manager.pop_blocks_for_free

def forget_one(self, request_id, first, stop):
    remove(self, request_id, first, stop - 1)
    row = self.req_to_blocks[request_id]
    if first < stop <= len(row) and not row[stop - 1].is_null:
        row[stop - 1] = self._null_block

def keep_life(self, request_id):
    found = pop(self, request_id)
    self._lives[request_id] = None
    return found

if sys.argv[1] == "block":
    Manager._remove_blocks_in_range = forget_one
elif sys.argv[1] == "life":
    Manager.pop_blocks_for_free = keep_life
else:
    view = backend.TrimmedView.skipped_blocks
    backend.TrimmedView.skipped_blocks = lambda self, metadata: view(self, metadata) * 0
sys.argv[1:2] = []
soak.main()
"""


def test_hundreds_of_requests_leave_nothing_behind(tmp_path):
    found = soak(400, tmp_path)
    counts = found["counts"]
    print(counts)
    assert found["problems"] == []
    assert counts["finished"] > 300
    assert sum(count for name, count in counts.items() if name.startswith("aborted")) > 30
    assert min(counts["preemptions"], counts["prefix hits"], counts["chunked prefills"], counts["compared"]) > 3
    assert counts["blocks reclaimed"] > counts["blocks"]


def test_graded_heads_leave_nothing_behind(tmp_path):
    found = soak(250, tmp_path, retention=0.3, graded=True, pool_blocks=240)
    counts = found["counts"]
    print(counts)
    assert found["problems"] == []
    assert counts["finished"] > 180
    assert min(counts["preemptions"], counts["prefix hits"], counts["chunked prefills"], counts["compared"]) > 3


@pytest.mark.parametrize(
    ("planted", "words"),
    [("block", "held, "), ("life", "StreamManager._lives"), ("view", "differs from the simulation")],
)
def test_what_goes_wrong_is_seen(tmp_path, planted, words):
    program = tmp_path / "planted.py"
    program.write_text(PLANTED)
    found = soak(60, tmp_path, pool_blocks=200, program=(str(program), planted))
    assert any(words in problem for problem in found["problems"]), found
