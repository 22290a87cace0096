"""Everything that talks to a server, against a real one with budgets, straight and through a proxy that misbehaves."""

from __future__ import annotations

import json
import math
import threading
import time

import pytest

from kvprofile.bench import runner
from kvprofile.bench.chat_client import Endpoint, Sampling
from kvprofile.bench.documents import pocket
from kvprofile.bench.engines.base import Running
from kvprofile.bench.leg_store import LegStore
from kvprofile.bench.legs import LegRun
from kvprofile.bench.load_generator import Sender, prompts
from kvprofile.bench.providers import Prices, Provider
from kvprofile.bench.scenario import BenchPlan, LegPlan, LoadPlan, remote_legs
from kvprofile.budget import store
from kvprofile.budget.trim import TrimRule
from kvprofile.client import BudgetsNotAppliedError, VLLMClient
from kvprofile.errors import InputError
from kvprofile.instrumentation import GPUMemoryManager, RequestLog
from kvprofile.records import provenance, run_files
from tests.helpers.clocks import stepping
from tests.helpers.disks import fill
from tests.helpers.faulty import FaultyProxy
from tests.helpers.models import POCKET, ROOT
from tests.vllm.engine import environment
from tests.vllm.served import KEY, serving_pocket

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm

BUDGET = ROOT / "models" / "kv_budget" / "pocket.json"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A server with half of pocket's heads full. Gives its address and its statistics file."""
    place = tmp_path_factory.mktemp("served")
    stats = place / "stats.jsonl"
    env = environment(
        BUDGET, LLM_KVZIP_RETENTION="0.5", LLM_KVZIP_KIND="whole", LLM_KVZIP_STATS=str(stats), VLLM_API_KEY=KEY
    )
    del env["VLLM_ENABLE_V1_MULTIPROCESSING"], env["VLLM_CPU_KVCACHE_SPACE"]  # which would win over the argument
    with serving_pocket(place / "log", env, "--no-enable-prefix-caching", "--kv-cache-memory-bytes", "67108864") as url:
        yield url, stats


def endpoint(url, **options):
    return Endpoint(f"{url}/v1", "pocket", KEY, **{"timeout_s": 60.0, **options})


def send(target, batch, concurrency=1, max_tokens=24):
    sender = Sender(target, Sampling(max_tokens), f"kvprofile-{time.time_ns():x}")
    found = {}
    sender.closed(batch, concurrency, lambda prompt, answer: found.update({prompt.number: answer}))
    return sender, found


def test_answers_are_right_and_timed_with_and_without_streaming(server):
    url, _ = server
    batch = prompts(pocket(0), 6, 0, unique=True)
    _, streamed = send(endpoint(url), batch, concurrency=3)
    _, whole = send(endpoint(url, stream=False), batch, concurrency=3)
    right = 0
    for prompt in batch:
        mine, other = streamed[prompt.number], whole[prompt.number]
        assert mine.error is None
        assert other.error is None
        assert mine.finish_reason == other.finish_reason == "stop"
        assert mine.input_tokens == other.input_tokens > 800
        assert mine.output_tokens == other.output_tokens
        assert mine.text == other.text  # greedy: the wire makes no difference
        assert mine.sent < mine.arrivals[0] <= mine.arrivals[-1] == mine.ended
        assert 1 <= len(mine.arrivals) <= mine.output_tokens
        assert other.arrivals == ()
        right += all(text in mine.text for text in prompt.question.expected)
    assert right >= 4


def test_requests_are_found_in_the_statistics_file(server):
    url, stats = server
    log = RequestLog(stats)
    profile = store.load(BUDGET)
    rule = TrimRule(profile.runtime.sink_tokens, profile.runtime.recent_tokens, 32)
    batch = prompts(pocket(0), 3, 1, unique=True)
    sender, found = send(endpoint(url), batch)
    for prompt in batch:
        held, answer = log.of(sender.request_id(prompt), wait_s=5), found[prompt.number]
        assert held is not None
        prompt_blocks = math.ceil(answer.input_tokens / 32)
        groups, rest = divmod(held.blocks_after_prefill, prompt_blocks)
        assert rest == 0
        freed = rule.first_recent_block(answer.input_tokens, answer.input_tokens) - rule.sink_blocks
        streams, rest = divmod(held.blocks_after_prefill - held.blocks_after_trim, freed)
        assert rest == 0
        assert 1 <= streams < groups
        assert held.eviction_ratio == pytest.approx(streams * freed / (groups * prompt_blocks))
        assert held.blocks_reclaimed >= streams * freed
        assert held.lives == 1
    assert log.of("kvprofile-nobody.0") is None
    assert 0 < log.eviction_ratio < 1


def test_memory_manager_agrees_with_the_engine(server, tmp_path):
    """While requests decode, bytes from vLLM's own usage and those that the runtime counts are one block apart."""
    import urllib.request

    from kvprofile.instrumentation import metric_values

    url, stats = server
    lines = tmp_path / "looks.jsonl"
    batch = prompts(pocket(0), 2, 2, unique=True)
    sender = Sender(endpoint(url, body={"ignore_eos": True}), Sampling(400), f"kvprofile-{time.time_ns():x}")
    thread = threading.Thread(target=lambda: sender.closed(batch, 2, lambda *_: None))
    manager = GPUMemoryManager(url, interval_s=0.2, lines=lines, stats=stats)
    compared = []
    with manager:
        thread.start()
        while thread.is_alive():
            with urllib.request.urlopen(f"{url}/metrics", timeout=30) as answer:  # noqa: S310 - our own server
                text = answer.read().decode()
            values = metric_values(text)
            if values["vllm:num_requests_running"] == 2 and values["kvprofile_kv_block_bytes"]:
                usable = (values["pool_blocks"] - 1) * values["kvprofile_kv_block_bytes"]
                theirs = values["vllm:kv_cache_usage_perc"] * usable
                compared.append(abs(theirs - values["kvprofile_kv_bytes_in_use"]) / values["kvprofile_kv_block_bytes"])
            time.sleep(0.05)
        thread.join()
    looks = manager.looks
    busy = [look for look in looks if look.running == 2]
    assert busy
    assert all(0 < look.cache_bytes_in_use <= look.cache_bytes_total for look in busy)
    assert looks[-1].cache_bytes_total <= 67108864 < looks[-1].cache_bytes_total + looks[-1].block_bytes
    assert sorted(compared)[len(compared) // 2] <= 1  # blocks, in the middle of all moments
    assert looks[-1].cache_bytes_in_use == 0  # everything was given back
    assert looks[-1].kv_bytes_reclaimed > 0
    assert 0 < looks[-1].eviction_ratio < 1
    assert looks[-1].process_memory_bytes is None  # nobody said which process it is
    written = [json.loads(line) for line in lines.read_text().splitlines()]
    assert [line["cache_bytes_in_use"] for line in written] == [look.cache_bytes_in_use for look in looks]


def test_client_over_http(server, monkeypatch):
    url, stats = server
    document = pocket(0)[1]
    question = document.questions[0]
    content = f"{document.text}\n\n{question.text}"
    monkeypatch.setenv("LLM_KVZIP_ENABLED", "1")
    with VLLMClient(url=url, api_key=KEY, stats=stats) as client:
        found = client.generate_response(messages=[{"role": "user", "content": content}], max_tokens=30, temperature=0)
        assert question.expected[0] in found.text
        assert found.cache.blocks_after_trim < found.cache.blocks_after_prefill
        assert 0 < found.eviction_ratio < 1
        assert 0 < found.timings.ttft_ms < found.timings.e2el_ms
        assert found.output_tokens <= 30
        plain = client.generate_response("The old", max_tokens=5, temperature=0, ignore_eos=True)
        assert plain.output_tokens == 5
        assert plain.finish_reason == "length"
        with pytest.raises(InputError, match="not both"):
            client.generate_response("a", messages=[])


def test_client_raises_where_budgets_are_not_applied(server, monkeypatch):
    """A server that says nothing of budgets on /metrics: here one whose /metrics cannot be seen."""
    url, _ = server
    monkeypatch.setenv("LLM_KVZIP_ENABLED", "1")
    with FaultyProxy(url) as proxy:
        stock = proxy.forward
        proxy.forward = lambda handler, body, cut=False: (
            proxy.answer(handler, 200, b"vllm:num_requests_running 0\n", "text/plain")
            if handler.path == "/metrics"
            else stock(handler, body, cut)
        )
        with pytest.raises(BudgetsNotAppliedError, match="serves without budgets"):
            VLLMClient(url=proxy.url, api_key=KEY)
        monkeypatch.setenv("LLM_KVZIP_ENABLED", "0")
        with VLLMClient(url=proxy.url, api_key=KEY) as client:
            assert not client.budgets_applied
            assert client.generate_response("The old", max_tokens=2).cache is None


FAULTS = {
    "too many requests": [429, 429],
    "a server's error": [500, 503],
    "no answer": ["drop"],
    "broken streams": ["cut", "garbage"],
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults_that_pass_are_outlived(server, name):
    url, _ = server
    faults = FAULTS[name]
    with FaultyProxy(url, retry_after="0.2") as proxy:
        proxy.faults.extend(faults)
        began = time.perf_counter()
        _, found = send(endpoint(proxy.url, stream=True), prompts(pocket(0), 1, 3, unique=True))
        took = time.perf_counter() - began
    answer = found[0]
    assert answer.error is None, answer.error
    assert answer.attempts == len(faults) + 1
    assert proxy.posts == len(faults) + 1
    assert answer.ended - answer.sent < took - 0.2 * (len(faults) if faults[0] == 429 else 0)  # waiting is not latency
    assert set(proxy.keys) == {f"Bearer {KEY}"}


def test_retry_after_is_obeyed(server):
    url, _ = server
    with FaultyProxy(url, retry_after="1.5") as proxy:
        proxy.faults.append(429)
        began = time.perf_counter()
        _, found = send(endpoint(proxy.url), prompts(pocket(0), 1, 4, unique=True))
        assert found[0].sent - began >= 1.5


def test_slow_answers_end_at_the_limit(server):
    url, _ = server
    with FaultyProxy(url, slow_s=4) as proxy:
        proxy.always = "slow"
        _, found = send(endpoint(proxy.url, timeout_s=1.0, max_attempts=2), prompts(pocket(0), 1, 5, unique=True))
    assert found[0].error == "no answer within 1 s"
    assert found[0].attempts == 2


def test_a_refused_key_ends_at_once_and_is_never_repeated(server):
    url, _ = server
    with FaultyProxy(url) as proxy:
        proxy.always = 401
        _, found = send(endpoint(proxy.url), prompts(pocket(0), 4, 6, unique=True))
    assert proxy.posts == 1  # three others were not sent for nothing
    (answer,) = found.values()
    assert answer.hopeless
    assert answer.error.startswith("401: the key was refused")
    assert KEY not in answer.error
    assert "***" in answer.error  # the server had quoted it


def plan_of(legs, **changes):
    options = {"requests": 3, "warmup_requests": 1, "concurrency": 2, "max_output_tokens": 24}
    return BenchPlan(
        model=str(POCKET),
        model_name="pocket",
        legs=legs,
        documents=tuple(pocket(0)),
        load=LoadPlan(**options),
        **changes,
    )


def test_fill_finds_what_the_pool_holds(server, tmp_path):
    """Up to three at once fit into this pool; the leg is measured with as many and says how the pool was used."""
    url, stats = server
    leg = LegPlan("0.5", 0.5)
    load = LoadPlan(mode="fill", concurrency=3, requests=3, warmup_requests=0, max_output_tokens=40)
    plan = BenchPlan(
        model=str(POCKET),
        model_name="pocket",
        legs=(leg,),
        documents=tuple(pocket(0)),
        load=load,
        profile=str(BUDGET),
    )
    parts = LegStore(tmp_path / "run", plan)
    parts.open(force=False)
    running = LegRun(plan, leg, 0, parts, None, lambda _: None)
    running._load(Running(endpoint(url), metrics_url=url, stats=stats))
    outcome = running.outcome
    assert outcome.concurrency == 3
    assert len(outcome.rows) == 3
    for row in outcome.rows:
        assert row.blocks_after_trim < row.blocks_after_prefill
        assert row.blocks_at_end <= row.blocks_after_trim + 2 * 8
        assert row.preemptions == 0
    assert 0 < outcome.eviction_ratio < 1
    assert outcome.pool_bytes <= 67108864
    assert outcome.block_tokens == 32


def test_remote_legs_and_their_records(server, tmp_path, monkeypatch, capfd):
    """Legs at providers: one works, one has no key, one is refused, one is not there. None takes another with it."""
    url, _ = server
    monkeypatch.setenv("GOOD_KEY", KEY)
    monkeypatch.setenv("BAD_KEY", "sk-wrong-key-9999")
    monkeypatch.delenv("MISSING_KEY", raising=False)
    prices = Prices(currency="EUR", input_per_million_tokens=1.0, output_per_million_tokens=10.0)
    said = []
    with FaultyProxy(url) as proxy:
        proxy.faults.extend([None, 500])
        base = f"{proxy.url}/v1"
        providers = [
            Provider(name="works", base_url=base, key_env="GOOD_KEY", prices=prices),
            Provider(name="keyless", base_url=base, key_env="MISSING_KEY"),
            Provider(name="refused", base_url=base, key_env="BAD_KEY"),
            Provider(name="absent", base_url="http://127.0.0.1:9/v1", model="pocket", timeout_s=2),
            Provider(name="whole", base_url=base, key_env="GOOD_KEY", stream=False),
            Provider(name="other", base_url=base, key_env="GOOD_KEY", model="gpt-none"),
        ]
        plan = plan_of(remote_legs(providers))
        found = runner.run(plan, tmp_path / "run", said.append)
        legs = {leg.name.removeprefix("remote-"): leg for leg in found.legs}
        again = runner.run(plan, tmp_path / "run", said.append)
    assert [leg.status for leg in found.legs] == ["ok", "failed", "failed", "failed", "ok", "failed"]
    works = legs["works"]
    assert works.metrics.completed == 3
    assert works.metrics.mean_ttft_ms > 0
    assert works.provider == "works"
    assert works.retention_asked is None
    read, written = works.metrics.total_input_tokens, works.metrics.total_output_tokens
    assert works.cost.amount == pytest.approx((read + 10 * written) / 1e6)
    assert {verdict.name for request in works.requests for verdict in request.verdicts} >= {"expected", "loops"}
    assert legs["keyless"].reason == "provider keyless needs a key: set MISSING_KEY"
    assert legs["refused"].reason == "refused refuses the key in BAD_KEY (401)"
    assert legs["absent"].reason.startswith("absent cannot be reached")
    assert legs["other"].reason == "other has no model gpt-none; it offers pocket"
    whole = legs["whole"]
    assert whole.metrics.mean_ttft_ms is None
    assert whole.metrics.mean_e2el_ms > 0
    assert whole.cost is None
    # another run keeps what is done and tries the rest again
    assert sum("done before" in line for line in said) == 2
    assert [leg.status for leg in again.legs] == [leg.status for leg in found.legs]
    assert run_files.load(tmp_path / "run" / "record.json") == again
    printed = capfd.readouterr()
    everything = "".join([printed.out, printed.err, *said])
    everything += "".join(path.read_text() for path in (tmp_path / "run").rglob("*") if path.is_file())
    for secret in (KEY, "sk-wrong-key-9999"):
        assert secret not in everything


def test_a_leg_that_is_interrupted_keeps_its_rows_and_runs_again(server, tmp_path, monkeypatch):
    url, _ = server
    monkeypatch.setenv("GOOD_KEY", KEY)
    with FaultyProxy(url) as proxy:
        provider = Provider(name="works", base_url=f"{proxy.url}/v1", key_env="GOOD_KEY")
        plan = plan_of((LegPlan("first", provider=provider), LegPlan("second", provider=provider)))
        original = runner.LegRun.run
        monkeypatch.setattr(runner.LegRun, "run", interrupting(original, "second"))
        with pytest.raises(KeyboardInterrupt):
            runner.run(plan, tmp_path / "run", lambda _: None)
        kept = run_files.load(tmp_path / "run" / "record.json")
        assert [(leg.name, leg.status) for leg in kept.legs] == [("first", "ok"), ("second", "failed")]
        assert kept.legs[1].reason == "interrupted after 1 of 3 requests"
        assert len(kept.legs[1].requests) == 1
        monkeypatch.setattr(runner.LegRun, "run", original)
        posts = proxy.posts
        whole = runner.run(plan, tmp_path / "run", lambda _: None)
        assert proxy.posts == posts + 4  # the second leg and its warm-up, nothing else
    assert [leg.status for leg in whole.legs] == ["ok", "ok"]
    assert whole.legs[0] == kept.legs[0]


def test_steps_of_the_clock_do_not_change_times(server, tmp_path, monkeypatch):
    url, stats = server
    plan = plan_of((LegPlan("0.5", 0.5),), profile=str(BUDGET))
    parts = LegStore(tmp_path / "run", plan)
    parts.open(force=False)
    running = LegRun(plan, plan.legs[0], 0, parts, None, lambda _: None)
    stepping(monkeypatch)
    running._load(Running(endpoint(url), metrics_url=url, stats=stats))
    leg = runner._leg(plan, plan.legs[0], 0, running.outcome, provenance.now(), None, parts.profile)
    assert 0 < leg.metrics.duration < 600
    times = [sample.t_s for sample in leg.samples]
    assert times == sorted(times)
    assert 0 <= times[0] <= times[-1] < leg.metrics.duration + 60
    for row in leg.requests:
        assert 0 <= row.start_s <= row.start_s + row.e2el_ms / 1000 <= leg.metrics.duration
        assert 0 < row.ttft_ms < row.e2el_ms


def test_a_full_disk_in_a_leg_stops_the_benchmark_and_loses_nothing(server, monkeypatch, disk):
    url, _ = server
    monkeypatch.setenv("GOOD_KEY", KEY)
    place, _ = disk
    provider = Provider(name="works", base_url=f"{url}/v1", key_env="GOOD_KEY")
    plan = plan_of((LegPlan("first", provider=provider), LegPlan("second", provider=provider)))
    said = []

    def say(line):
        said.append(line)
        if line.startswith("[2/2]") and "starting" in line and not (place / "ballast").exists():
            fill(place)

    with pytest.raises(InputError, match=r"^cannot write .*; free space"):
        runner.run(plan, place / "run", say)
    kept = run_files.load(place / "run" / "record.json")
    assert [(leg.name, leg.status) for leg in kept.legs] == [("first", "ok")]
    assert not list(place.rglob(".*"))
    (place / "ballast").unlink()
    whole = runner.run(plan, place / "run", lambda _: None)
    assert [leg.status for leg in whole.legs] == ["ok", "ok"]
    assert whole.legs[0] == kept.legs[0]


def interrupting(original, name):
    """Ctrl-C after the first answer of a leg."""

    def run(self):
        if self.leg.name == name:

            class Rows(list):
                def append(self, row):
                    super().append(row)
                    raise KeyboardInterrupt

            self.outcome.rows = Rows()
        return original(self)

    return run


def test_other_settings_are_refused(server, tmp_path):
    del server
    place = tmp_path / "run"
    place.mkdir()
    (place / "thesis.txt").write_text("mine")
    provider = Provider(name="absent", base_url="http://127.0.0.1:9/v1", model="pocket", timeout_s=2, max_attempts=1)
    with pytest.raises(InputError, match="not a benchmark's folder"):
        runner.run(plan_of(remote_legs([provider])), place, lambda _: None)
    (place / "thesis.txt").unlink()
    runner.run(plan_of(remote_legs([provider])), place, lambda _: None)
    with pytest.raises(InputError, match="other settings"):
        runner.run(plan_of(remote_legs([provider]), seed=1), place, lambda _: None)
    found = runner.run(plan_of(remote_legs([provider]), seed=1), place, lambda _: None, force=True)
    assert found.legs[0].seeds == [1]
