"""Parts of the benchmark that need no engine: providers, documents, plans, loads, numbers."""

from __future__ import annotations

import json
import math
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvprofile.bench import chat_client, documents, load_generator, prepare, providers, timings
from kvprofile.bench.bench_options import BenchOptions, EngineOptions, LoadPlan
from kvprofile.bench.leg_store import LegStore
from kvprofile.bench.scenario import BenchPlan, LegPlan, local_legs
from kvprofile.errors import InputError
from kvprofile.instrumentation import RequestLog, is_request, metric_values
from kvprofile.records.record import Experiment, Leg, Request
from tests.helpers.models import POCKET, ROOT


def make_plan(**changes):
    options = {
        "model": str(POCKET),
        "model_name": "pocket",
        "legs": local_legs((0.9, 0.5)),
        "documents": tuple(documents.pocket(0)),
        "profile": "models/kv_budget/pocket.json",
        **changes,
    }
    return BenchPlan(**options)


def test_bundled_providers_have_moonshot_ready():
    found = providers.choose("moonshot")
    assert found.base_url == "https://api.moonshot.ai/v1"
    assert found.key_env == "MOONSHOT_API_KEY"
    with pytest.raises(InputError, match=r"^provider moonshot needs a key: set MOONSHOT_API_KEY$"):
        found.key({})
    assert found.key({"MOONSHOT_API_KEY": " sk-1 "}) == "sk-1"
    with pytest.raises(InputError, match="no header can carry"):
        found.key({"MOONSHOT_API_KEY": "sk-ключ"})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[mine]\nbase_url = 'https://x/v1'\napi_key = 'sk-1'", "keep it in the environment"),
        ("[mine]\nbase_url = 'ftp://x'", "base_url"),
        ("[mine]\nbase_url = 'https://user:secret@x/v1'", "base_url"),
        ("[mine]", "needs a base_url"),
        ("mine = 1", "is no table"),
        ("[mine", "is no TOML"),
        ("[mine]\nbase_url = 'https://x'\nmax_attempts = 0", "max_attempts"),
        ("[mine]\nbase_url = 'https://x'\nspeed = 1", "speed"),
    ],
)
def test_broken_provider_files_say_what_is_wrong(tmp_path, text, said):
    file = tmp_path / "providers.toml"
    file.write_text(text)
    with pytest.raises(InputError, match=said) as error:
        providers.load(file)
    assert "sk-1" not in str(error.value)
    assert "secret" not in str(error.value)


def test_own_providers_add_to_the_bundled_ones(workplace):
    (workplace / "providers.toml").write_text(
        "[moonshot]\nbase_url = 'https://proxy/v1'\n[mine]\nbase_url = 'http://127.0.0.1:1/v1'\nbody = {top_k = 1}\n"
        "prices = {currency = 'EUR', input_per_million_tokens = 2, output_per_million_tokens = 8}"
    )
    found = providers.load()
    assert found["moonshot"].key_env is None
    assert found["mine"].prices.amount(1_000_000, 0, 500_000) == 6
    assert found["mine"].body == {"top_k": 1}
    with pytest.raises(InputError, match="no provider 'nobody'; known are loopback, mine, moonshot"):
        providers.choose("nobody")


def test_requests_hold_what_the_provider_takes():
    point = chat_client.Endpoint("http://x/v1", "m", body={"top_k": 1}, omit=("seed", "max_tokens"))
    body = chat_client._body(point, [{"role": "user", "content": "?"}], chat_client.Sampling(9, ignore_eos=True), 3)
    assert "seed" not in body
    assert "max_tokens" not in body
    assert body["extra_body"] == {"top_k": 1, "ignore_eos": True}
    assert body["stream_options"] == {"include_usage": True}
    whole = chat_client._body(chat_client.Endpoint("http://x/v1", "m", stream=False), [], chat_client.Sampling(9), 3)
    assert (whole["seed"], whole["max_tokens"], whole["temperature"]) == (3, 9, 0.0)
    assert "stream" not in whole


def test_keys_are_in_no_representation():
    point = chat_client.Endpoint("http://x/v1", "m", "sk-secret")
    assert "sk-secret" not in repr(point)
    assert point.without_key("bad key sk-secret\nand more") == "bad key *** and more"


@pytest.mark.parametrize(("header", "seconds"), [("3", 3.0), ("0.5", 0.5), ("-4", 0.0), ("soon", None), ("", None)])
def test_retry_after_in_seconds(header, seconds):
    assert chat_client._retry_after(header) == seconds


def test_retry_after_as_a_date():
    from email.utils import formatdate

    assert chat_client._retry_after(formatdate(time.time() + 30, usegmt=True)) == pytest.approx(30, abs=2)
    assert chat_client._retry_after(formatdate(time.time() - 30, usegmt=True)) == 0


def test_pocket_documents_are_their_own():
    """Seeded, different for every seed, and no exercise of the evaluation."""
    from kvprofile.questions.tasks import exercise

    first, same, other = documents.pocket(0), documents.pocket(0), documents.pocket(1)
    assert first == same
    assert not {d.sha256 for d in first} & {d.sha256 for d in other}
    evaluated = exercise("needle", "evaluate", 0, documents.POCKET_TASKS["needle"], 6)
    assert evaluated.context not in {d.text for d in first}
    for document in first:
        assert 3 <= len(document.questions) <= 6
        for question in document.questions:
            assert all(text in document.text for text in question.expected)


def test_bundled_documents_hold_their_answers():
    """Every reference answer passes its own question's verifiers, and what is expected stands in the document."""
    from kvprofile.bench.verifiers import BUILT_IN
    from kvprofile.bench.verifiers.base import Case
    from kvprofile.corpus.sources import bundled_names, load_corpus

    profiled = {text.text for name in bundled_names() for text in load_corpus(name).texts}
    found = documents.load(("bundled",))
    assert len(found) == 3
    for document in found:
        assert document.text not in profiled
        plain = document.text.replace("*", "")
        assert len(document.voice_samples) == 8
        assert all(sample in plain for sample in document.voice_samples)
        assert sum(question.in_voice for question in document.questions) == 4
        for question in document.questions:
            there = [text in document.text for text in question.expected]
            assert not there or (any(there) if question.any_of else all(there)), question.text
            if question.in_voice:
                continue
            asked = Case(document, question, question.answer, "reference", 0)
            verdicts = [BUILT_IN[name]().judge(asked) for name in ("expected", "pattern", "json-schema")]
            assert any(verdict is not None for verdict in verdicts), question.text
            assert all(verdict.passed for verdict in verdicts if verdict is not None), question.text


def test_bundled_documents_are_about_9000_tokens_long():
    """In characters and words, so that no tokenizer is needed: 8,900 to 9,300 tokens were counted at these sizes."""
    for document in documents.load(("bundled",)):
        assert 32_300 < len(document.text) < 35_600, document.name
        assert 6_200 < len(document.text.split()) < 7_200, document.name
        assert len(document.text) / prepare.CHARACTERS_PER_TOKEN == pytest.approx(9000, rel=0.06), document.name


def test_documents_from_files(tmp_path):
    (tmp_path / "a.md").write_text("# A\nThe code is 17.")
    (tmp_path / "a.json").write_text(json.dumps({"questions": [{"text": "Which code?", "expected": ["17"]}]}))
    (document,) = documents.load((str(tmp_path),))
    assert document.name == "a"
    assert document.questions[0].expected == ("17",)
    assert documents.load((str(tmp_path / "a.md"),)) == [document]
    with pytest.raises(InputError, match="two documents are called a"):
        documents.load((str(tmp_path), str(tmp_path / "a.md")))
    (tmp_path / "a.json").write_text(json.dumps({"questions": [{"texts": "?"}]}))
    with pytest.raises(InputError, match=r"a\.json: questions\.0"):
        documents.load((str(tmp_path),))
    (tmp_path / "b.md").write_text("x")
    (tmp_path / "a.json").write_text(json.dumps({"questions": [{"text": "?"}]}))
    with pytest.raises(InputError, match=r"b\.json: cannot read: No such file"):
        documents.load((str(tmp_path),))
    with pytest.raises(InputError, match="no documents 'nothing'"):
        documents.load(("nothing",))


def test_openings_are_unlike_each_other():
    found = [documents.unique_opening(seed, number) for seed in range(3) for number in range(-5, 500)]
    assert len(set(found)) == len(found)
    firsts = [text.split(".")[0] for text in found]
    assert len(set(firsts)) > 0.95 * len(firsts)


def test_prompts_go_around_documents_and_questions():
    found = load_generator.prompts(documents.pocket(0), 30, 7, unique=True)
    assert [p.document.name for p in found[:4]] == ["persona", "needle", "lookup", "persona"]
    assert len({p.text for p in found}) == 30
    assert len({p.seed for p in found}) == 30
    assert {(p.document.name, p.question.text) for p in found[:18]} == {
        (d.name, q.text) for d in documents.pocket(0) for q in d.questions
    }
    assert found == load_generator.prompts(documents.pocket(0), 30, 7, unique=True)
    plain = load_generator.prompts(documents.pocket(0), 1, 7, unique=False)[0]
    assert plain.text == f"{plain.document.text}\n\n{plain.question.text}"


@given(st.integers(0, 200), st.integers(1, 128))
def test_fill_finds_the_largest_that_passes(capacity, most):
    tried = []

    def trial(count):
        tried.append(count)
        return count <= capacity

    assert load_generator.fill(trial, most) == min(capacity, most)
    assert len(tried) == len(set(tried))
    assert len(tried) <= 2 * math.log2(most + 1) + 2
    assert max(tried) <= most


def test_schedule_turns_around():
    plan = make_plan(repetitions=2)
    assert [(leg.name, r) for leg, r in plan.schedule] == [
        ("baseline", 0), ("0.9", 0), ("0.5", 0), ("0.5", 1), ("0.9", 1), ("baseline", 1),
    ]  # fmt: skip
    assert plan.seed_of(1) == plan.seed + 1


def test_keys_say_what_may_continue():
    plan = make_plan()
    assert plan.run_key() == make_plan(legs=local_legs((0.3,)), repetitions=3, verifiers=("loops",)).run_key()
    assert plan.run_key() != make_plan(seed=1).run_key()
    assert plan.run_key() != make_plan(load=LoadPlan(concurrency=3)).run_key()
    assert plan.run_key() != make_plan(documents=tuple(documents.pocket(1))).run_key()
    assert plan.run_key() != make_plan(profile_sha256="0" * 64).run_key()
    leg = plan.legs[1]
    assert plan.leg_key(leg, 0) != plan.leg_key(leg, 1)
    assert plan.leg_key(leg, 0) != plan.leg_key(LegPlan("0.9", 0.8), 0)


def test_settings_fit_the_record():
    settings = make_plan(engine=EngineOptions(extra=("--max-num-seqs", "4"))).settings()
    assert Experiment(name="x", settings=settings).settings["engine_extra"] == ["--max-num-seqs", "4"]
    assert str(ROOT) not in json.dumps(settings)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"mode": "open"}, "--request-rate"),
        ({"request_rate": 1.0}, "--load open"),
        ({"concurrency": 0}, "--concurrency"),
        ({"temperature": -1.0}, "--temperature"),
        ({"max_output_tokens": 0}, "--max-output-tokens"),
    ],
)
def test_loads_that_make_no_sense(changes, said):
    with pytest.raises(InputError, match=said):
        LoadPlan(**changes)


def test_legs_need_a_budget_file():
    with pytest.raises(InputError, match="no budget file for pocket"):
        make_plan(profile=None)
    make_plan(profile=None, legs=local_legs((), baseline=True))
    with pytest.raises(InputError, match=r"retention 1\.5 is outside"):
        local_legs((1.5,))


def test_what_is_unknown_stays_unknown():
    whole = chat_client.Answer(1.0, 3.0, "text", (), "stop")
    assert timings.timings(whole) == {"ttft_ms": None, "tpot_ms": None, "e2el_ms": 2000.0, "itl_ms": None}
    found = timings.metrics([Request(start_s=0.0, output="x", **timings.timings(whole))], 2.0)
    assert found.total_output_tokens is None
    assert found.output_throughput is None
    assert found.mean_ttft_ms is None
    assert found.mean_e2el_ms == 2000.0
    assert found.max_concurrent_requests is None


def test_most_at_once_counts_overlaps():
    spans = [(0.0, 1.0, 3.0), (0.0, 2.0, 4.0), (0.0, 3.5, 5.0)]
    rows = [Request(start_s=s, ttft_ms=(f - s) * 1000, e2el_ms=(e - s) * 1000) for s, f, e in spans]
    assert timings.most_at_once(rows) == 2


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


def test_parts_keep_finished_legs_only_for_the_same_settings(tmp_path):
    plan = make_plan()
    leg = plan.legs[1]
    parts = LegStore(tmp_path / "run", plan)
    parts.open(force=False)
    assert parts.finished(leg, 0) is None
    done = Leg(name="0.9", kind="local", status="ok", model="pocket", load={"mode": "closed"})
    rows = parts.rows(leg, 0)
    rows.add(Request(document="needle", output="x\u2028<script>"))
    rows.close()
    assert [row.output for row in parts.interrupted(leg, 0)] == ["x\u2028<script>"]
    parts.save(leg, 0, done)
    assert parts.interrupted(leg, 0) == []
    assert LegStore(tmp_path / "run", make_plan(repetitions=2)).finished(leg, 0) == done
    assert parts.finished(leg, 1) is None
    with pytest.raises(InputError, match="other settings"):
        LegStore(tmp_path / "run", make_plan(seed=3)).open(force=False)


@pytest.mark.usefixtures("workplace")
def test_prepare_says_why(monkeypatch):
    monkeypatch.delenv("MOONSHOT_API_KEY", raising=False)
    asked = BenchOptions(model=str(POCKET), profile=ROOT / "models/kv_budget/pocket.json", preset="seed")
    found = prepare.prepare(asked)
    plan = found.plan
    assert [leg.name for leg in plan.legs] == ["baseline", "0.9", "0.7", "0.5", "remote"]
    assert plan.repetitions == 2
    assert len(plan.documents) == 3
    assert any("reads 4,096 positions" in reason for reason in found.reasons)
    described = prepare.described(plan, found.reasons)
    json.dumps(described)
    assert "provider moonshot needs a key: set MOONSHOT_API_KEY" in described["missing"]
    assert described["estimate"]["cost_at_most"]["remote"] == {"amount": None, "currency": None}
    with pytest.raises(InputError, match="no preset 'x'"):
        prepare.prepare(BenchOptions(model=str(POCKET), preset="x"))
    with pytest.raises(InputError, match="no budget file"):
        prepare.prepare(BenchOptions(model=str(POCKET)))


def test_a_file_that_happens_to_lie_here_sends_no_key_elsewhere(workplace):
    file = workplace / "providers.toml"
    file.write_text("[moonshot]\nbase_url = 'https://evil.example/v1'\nkey_env = 'MOONSHOT_API_KEY'")
    with pytest.raises(InputError, match=r"sends MOONSHOT_API_KEY to https://evil\.example/v1 under the name moonshot"):
        providers.load()
    assert providers.choose("moonshot", file).base_url == "https://evil.example/v1"  # asked for
    asked = BenchOptions(model=str(POCKET), local=False, providers=("moonshot",), providers_file=file)
    said = "provider moonshot: https://evil.example/v1, with MOONSHOT_API_KEY"
    assert said in prepare.prepare(asked).reasons
