"""What a running engine tells: request ids, its log of requests, its metrics."""

from __future__ import annotations

import json

from kvprofile.instrumentation import GPUMemoryManager, RequestLog, is_request, metric_values


def test_engine_ids_are_matched_to_requests():
    assert is_request("chatcmpl-kvprofile-ab12.3-89abcdef", "kvprofile-ab12.3")
    assert is_request("cmpl-kvprofile-ab12-0-89abcdef", "kvprofile-ab12")
    assert is_request("7-89abcdef", "7")
    assert not is_request("chatcmpl-kvprofile-ab12.30-89abcdef", "kvprofile-ab12.3")
    assert not is_request("17-89abcdef", "7")


def test_request_log_reads_what_is_new_and_whole(tmp_path):
    path = tmp_path / "stats.jsonl"
    path.write_text(json.dumps({"request_id": "old-00000000", "blocks_reclaimed": 1}) + "\n")
    log = RequestLog(path)
    assert log.read() == {}
    line = {"request_id": "a-00000000", "block_bytes": 64, "blocks_after_prefill": 10, "blocks_after_trim": 4}
    with path.open("a") as file:
        file.write(json.dumps({"kv_bytes_in_use": 3}) + "\nnot json\n")
        file.write(json.dumps({**line, "blocks_at_end": 6, "blocks_reclaimed": 7}) + "\n")
        file.write('{"request_id": "half')
    found = log.of("a")
    assert (found.blocks_after_prefill, found.eviction_ratio, found.lives) == (10, 0.6, 1)
    with path.open("a") as file:
        file.write('-00000000", "blocks_reclaimed": 0, "blocks_at_end": 3}\n')
        file.write(json.dumps({**line, "blocks_at_end": 2, "blocks_reclaimed": 5}) + "\n")
    assert (log.of("a").lives, log.of("a").blocks_reclaimed, log.of("a").blocks_at_end) == (2, 12, 2)
    assert log.of("half").eviction_ratio is None
    assert log.eviction_ratio == 0.6


def test_metrics_are_read_by_their_text():
    text = (
        'vllm:cache_config_info{block_size="32",engine="0",num_gpu_blocks="341"} 1.0\n'
        'vllm:kv_cache_usage_perc{engine="0"} 0.25\n'
        'vllm:num_requests_running{engine="0"} 2.0\nvllm:num_requests_running{engine="1"} 3.0\n'
    )
    found = metric_values(text)
    assert (found["pool_blocks"], found["block_tokens"]) == (341, 32)
    assert found["vllm:num_requests_running"] == 5
    assert (found["replicas"], found["vllm:kv_cache_usage_perc"]) == (1, 0.25)


def test_pools_of_several_replicas_are_one(monkeypatch):
    text = "".join(
        f'vllm:cache_config_info{{block_size="32",engine="{engine}",num_gpu_blocks="{blocks}"}} 1.0\n'
        f'vllm:kv_cache_usage_perc{{engine="{engine}"}} {usage}\n'
        f'kvprofile_kv_block_bytes{{engine="{engine}"}} {width}\n'
        for engine, blocks, usage, width in ((0, 402, 0.5, 64), (1, 402, 0.25, 0))
    )
    monkeypatch.setattr("kvprofile.instrumentation.scrape", lambda _: text)
    look = GPUMemoryManager("http://127.0.0.1:9").sample()
    assert (look.replicas, look.block_tokens, look.block_bytes) == (2, 32, 64)
    assert look.cache_usage == 0.375
    assert look.cache_bytes_total == 402 * 64
    assert look.cache_bytes_in_use == round(look.cache_usage * 400 * 64)
