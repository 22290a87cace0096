"""The runtime across processes: tensor parallelism, and ``vllm serve`` with its metrics, as the doctor sees them."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from kvprofile.cli import run
from kvprofile.client import VLLMClient
from kvprofile.evaluate.simulate import simulating
from kvprofile.instrumentation import GPUMemoryManager
from kvprofile.prometheus import labels_of, metric_values
from kvprofile.records import run_files
from kvprofile.runtime import doctor
from tests.helpers import grafana
from tests.helpers.models import POCKET, ROOT
from tests.vllm.engine import NEAR_TIE, compare_all, environment, make_subject, serve, write_budget
from tests.vllm.served import HEADS, RULE, draw, fetch, running, serving

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm

BUDGET = ROOT / "models" / "kv_budget" / "pocket.json"


APART = [
    [1.0, 0.0, 1.0, 0.0, 0.0, 1.0, 0.0, 1.0],
    [0.0] * 8,
    [1.0] * 8,
    [0.0, 1.0, 1.0, 0.0, 1.0, 0.0, 0.0, 1.0],
]
"""On each of two ranks equally many full heads, not side by side: weights load in another order on each."""


def test_tensor_parallel_ranks_hold_their_heads(tmp_path):
    subject = make_subject(tmp_path / "tiny", num_key_value_heads=8)
    rng = random.Random("ranks")
    batches = [[(draw(rng, count), most) for count, most in ((300, 40), (20, 100), (64, 1), (130, 30))]]
    env = environment(write_budget(tmp_path / "b.json", subject, APART, RULE), VLLM_CPU_OMP_THREADS_BIND="nobind")
    found = serve(subject, batches, env, tensor_parallel_size=2)
    assert "heads of 2 layers load in order, of 0 are gathered" in found["log"]
    compare_all(subject, APART, RULE, batches, found)


@pytest.fixture
def server(tmp_path, tokenizer):
    """A served model. Gives its address, the model and the statistics file."""
    subject = make_subject(tmp_path / "tiny")
    tokenizer.save_pretrained(subject.folder)
    stats = tmp_path / "stats.jsonl"
    env = environment(write_budget(tmp_path / "b.json", subject, HEADS, RULE), LLM_KVZIP_STATS=str(stats))
    del env["VLLM_ENABLE_V1_MULTIPROCESSING"]
    with serving(subject.folder, tmp_path / "server.log", env, "--max-model-len", "1024") as address:
        yield address, subject, stats


def replicated(model, log, env, *arguments):
    """A model from `vllm serve` itself, which several API processes and replicas need. Gives its address."""
    command = [sys.executable, "-m", "tests.vllm.serve_command", "serve", str(model), "--served-model-name", model.name]
    command += ["--dtype", "float32", "--max-model-len", "1024", "--block-size", "32", *arguments]
    return running(command, log, env, cwd=ROOT)


@pytest.mark.parametrize("several", ["api servers", "a folder of the user's"])
def test_metrics_that_several_processes_share(several, tmp_path, monkeypatch):
    """vLLM joins them from files, where a plugin's metrics are missing unless the plugin adds them.

    Doctor, client, memory manager and dashboard read the same.
    """
    shared, stats = tmp_path / "shared", tmp_path / "stats.jsonl"
    shared.mkdir()
    own = {"PROMETHEUS_MULTIPROC_DIR": str(shared)} if several != "api servers" else {}
    env = environment(BUDGET, LLM_KVZIP_RETENTION="0.5", LLM_KVZIP_STATS=str(stats), **own)
    del env["VLLM_ENABLE_V1_MULTIPROCESSING"]
    more = [] if own else ["--api-server-count", "2"]
    with replicated(POCKET, tmp_path / "server.log", env, *more) as address:
        assert doctor.server(address).good
        body = {"model": "pocket", "prompt": "The old archive. " * 60, "max_tokens": 8, "ignore_eos": True}
        for _ in range(4):
            fetch(f"{address}/v1/completions", body)
        monkeypatch.setenv("LLM_KVZIP_ENABLED", "1")  # so that the client asks for proof
        with VLLMClient(url=address, stats=stats) as client:
            answered = client.generate_response("The new archive. " * 60, max_tokens=8)
        pages = [fetch(f"{address}/metrics") for _ in range(8)]  # whichever process answers
        check, look = doctor.server(address), GPUMemoryManager(address).sample()
    assert all(doctor.OWN_PROCESS not in metric_values(page) for page in pages)
    freed = {metric_values(page)["kvprofile_kv_bytes_reclaimed_total"] for page in pages}
    assert len(freed) == 1
    assert answered.cache.blocks_reclaimed > 0
    assert check.good, check.detail
    assert "graded heads, retention 0.5" in check.detail  # the file has a probe
    assert f"{freed.copy().pop() / 2**20:.1f} MiB given back" in check.detail
    assert look.kv_bytes_reclaimed == freed.pop() > 0
    assert look.replicas == 1
    assert look.cache_bytes_total > look.block_bytes > 0
    assert all(grafana.metrics() <= grafana.names_in(page) for page in pages)


@pytest.mark.slow
def test_two_replicas_trim_and_add_up(tmp_path, tokenizer, capsys):
    """Data parallelism: outputs of both are the simulation's, and one server's metrics and statistics have both."""
    subject = make_subject(tmp_path / "tiny")
    tokenizer.save_pretrained(subject.folder)
    stats, budget = tmp_path / "stats.jsonl", write_budget(tmp_path / "b.json", subject, HEADS, RULE)
    env = environment(budget, LLM_KVZIP_STATS=str(stats), VLLM_CPU_OMP_THREADS_BIND="nobind")
    del env["VLLM_ENABLE_V1_MULTIPROCESSING"]
    rng = random.Random("replicas")
    asked = {0: [draw(rng, 700), draw(rng, 330)], 1: [draw(rng, 512)]}
    outputs = []
    with replicated(subject.folder, tmp_path / "server.log", env, "--data-parallel-size", "2") as address:
        for replica, its in asked.items():
            for prompt in its:
                body = {"model": "tiny", "prompt": prompt, "max_tokens": 24, "temperature": 0, "ignore_eos": True}
                header = {"X-data-parallel-rank": str(replica)}
                answer = json.loads(fetch(f"{address}/v1/completions", body | {"return_token_ids": True}, header))
                outputs.append((prompt, answer["choices"][0]["token_ids"]))
        pages = [fetch(f"{address}/metrics") for _ in range(6)]
        look = GPUMemoryManager(address).sample()
        assert run(["doctor", "--url", address, "--url", f"{address}/v1"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "given back so far, 2 replicas" in said
    assert "all 2 servers apply budget" in said

    freed = freed_by_engine(pages[0])
    assert {*freed} == {labels["engine"] for labels in labels_of(pages[0], "vllm:kv_cache_usage_perc")} == {"0", "1"}
    assert all(freed_by_engine(page) == freed for page in pages)
    by_lines = dict.fromkeys(freed, 0.0)
    for line in map(json.loads, stats.read_text().splitlines()):
        if "request_id" in line:
            by_lines[str(line["engine"])] += line["blocks_reclaimed"] * line["block_bytes"]
    assert by_lines == freed
    assert min(freed.values()) > 0
    assert look.kv_bytes_reclaimed == sum(freed.values())
    assert (look.replicas, look.running) == (2, 0)
    with simulating(subject.model, subject.geometry, HEADS, RULE) as simulation:
        for prompt, tokens in outputs:
            logits = [simulation.prefill(prompt)]
            logits += simulation.start().read([tokens[:-1]])[0]
            for row, token in zip(logits, tokens, strict=True):
                assert float(row.max() - row[token]) < NEAR_TIE


def freed_by_engine(page):
    """Bytes given back by replica."""
    families = text_string_to_metric_families(page)
    samples = [sample for family in families for sample in family.samples]
    return {s.labels["engine"]: s.value for s in samples if s.name == "kvprofile_kv_bytes_reclaimed_total"}


SERVE = """
from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = FlexibleArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""
"""What `vllm bench serve` runs; the command itself looks for a distribution called vllm."""


def bench_serve(address, model, result):
    """Have vLLM's own benchmark send four requests to a server and write its result file."""
    command = [sys.executable, "-c", SERVE, "--backend", "openai", "--base-url", address, "--model", str(model)]
    command += ["--dataset-name", "random", "--random-input-len", "40", "--random-output-len", "8"]
    command += ["--num-prompts", "4"]
    command += ["--max-concurrency", "2", "--save-result", "--save-detailed", "--result-filename", result.name]
    command += ["--result-dir", str(result.parent), "--metadata", "leg=0.5", "retention=0.5", "kind=local"]
    run = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=400, check=False)
    assert run.returncode == 0, run.stderr[-3000:]


def test_vllm_serve_applies_budgets_and_says_so(server, tmp_path):
    address, subject, stats = server
    prompt, asked = draw(random.Random("serve"), 400), 40
    body = {"model": str(subject.folder), "prompt": prompt, "max_tokens": asked, "temperature": 0, "ignore_eos": True}
    body |= {"return_token_ids": True}
    tokens = json.loads(fetch(f"{address}/v1/completions", body))["choices"][0]["token_ids"]
    assert len(tokens) == asked
    with simulating(subject.model, subject.geometry, HEADS, RULE) as simulation:
        logits = [simulation.prefill(prompt)]
        logits += simulation.start().read([tokens[:-1]])[0]
    for row, token in zip(logits, tokens, strict=True):
        assert float(row.max() - row[token]) < NEAR_TIE

    check = doctor.server(address)
    assert check.good, check.detail
    text = fetch(f"{address}/metrics")
    assert grafana.metrics() <= grafana.names_in(text), "the dashboard queries what this server does not have"
    values = metric_values(text)
    assert float(values["kvprofile_full_heads"]) == 8
    first_freed, last_freed = RULE.sink_blocks, RULE.first_recent_block(len(prompt) + asked - 1, len(prompt))
    groups = float(values["kvprofile_kv_blocks_reclaimed_total"]) / (last_freed - first_freed)
    assert groups == int(groups) >= 1  # each streaming group gave back the same blocks
    assert float(values["kvprofile_kv_bytes_reclaimed_total"]) > 0
    lines = [json.loads(line) for line in Path(stats).read_text().splitlines()]
    pool, requests = [[line for line in lines if ("request_id" in line) is kind] for kind in (False, True)]
    assert pool[-1]["kv_blocks_reclaimed_total"] >= 0
    assert "kv_bytes_in_use" in pool[-1]
    (request,) = requests
    reclaimed = float(values["kvprofile_kv_blocks_reclaimed_total"])
    assert request["request_id"].startswith("cmpl-")
    assert request["blocks_reclaimed"] == reclaimed
    assert request["block_bytes"] * reclaimed == float(values["kvprofile_kv_bytes_reclaimed_total"])
    prompt_blocks, end_blocks = -(-len(prompt) // 32), -(-(len(prompt) + asked - 1) // 32)
    all_groups, rest = divmod(request["blocks_after_prefill"], prompt_blocks)
    assert rest == 0
    freed_at_once = groups * (RULE.first_recent_block(len(prompt), len(prompt)) - first_freed)
    assert request["blocks_after_trim"] == request["blocks_after_prefill"] - freed_at_once
    assert request["blocks_at_end"] == all_groups * end_blocks - reclaimed

    result = tmp_path / "result.json"
    bench_serve(address, subject.folder, result)
    raw, (leg,) = json.loads(result.read_text()), run_files.load(result).legs
    assert (leg.name, leg.kind, leg.retention_asked, leg.model) == ("0.5", "local", 0.5, subject.folder.name)
    for key in ("duration", "completed", "total_output_tokens", "output_throughput", "median_ttft_ms", "p99_itl_ms"):
        assert getattr(leg.metrics, key) == raw[key]
    assert len(leg.requests) == leg.metrics.completed == 4
    assert [request.ttft_ms for request in leg.requests] == [seconds * 1000 for seconds in raw["ttfts"]]
