"""Per-head budgets in a real engine: greedy tokens are the simulation's, in float32, whatever the scheduler does."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from types import SimpleNamespace

import pytest
import transformers

from kvprofile.budget.profile import FULL_ATTENTION
from kvprofile.budget.trim import DEFAULT_WINDOW, SLIDING, WINDOWS, TrimRule
from kvprofile.runtime.settings import STATE_RELEASE, release_of
from tests.helpers.models import HYBRIDS
from tests.vllm.engine import (
    CLOSE,
    UNEVEN,
    compare_all,
    draw,
    draw_batch,
    environment,
    finite,
    make_subject,
    serve,
    write_budget,
)
from tests.vllm.runners import V1, V1_ASYNC, V2, V2_ASYNC, on

vllm = pytest.importorskip("vllm")
from vllm.v1.attention.backend import MultipleOf  # noqa: E402

pytestmark = pytest.mark.vllm

HERE = release_of(vllm.__version__)

SPARSE = [[0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0], [0.0, 0.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]]
FULL = [[1.0] * 4] * 4


@pytest.fixture(scope="module")
def subject(tmp_path_factory):
    return make_subject(tmp_path_factory.mktemp("engine") / "tiny")


@on(V1, V2)
@pytest.mark.parametrize("window", WINDOWS)
def test_pressure_chunks_and_prefix_hits(subject, tmp_path, window, runner):
    check_pressure(subject, tmp_path, window, runner)


@on(V1_ASYNC, V2_ASYNC)
def test_pressure_where_scheduling_is_asynchronous(subject, tmp_path, runner):
    check_pressure(subject, tmp_path, DEFAULT_WINDOW, runner)


def check_pressure(subject, tmp_path, window, runner):
    """A pool for one and a half requests, prompts in chunks of at most 70 tokens, blocks poisoned when freed."""
    rng, rule = random.Random("pressure"), TrimRule(16, 64, 32, window)
    shared = draw(rng, 200)
    batches = [draw_batch(rng, 20, shared=shared) for _ in range(runner.some(3))]
    turns = [draw(rng, 150)]
    for _ in range(3):  # a conversation that comes back with its own answer, here as any other tokens
        turns.append(turns[-1] + draw(rng, 70))
    batches += [[(turn, 40)] for turn in turns]
    found = serve(
        subject,
        batches,
        runner.environment(write_budget(tmp_path / "b.json", subject, UNEVEN, rule)),
        **runner.arguments,
        window=window,
        num_gpu_blocks_override=52,
        max_num_batched_tokens=70,
        max_num_seqs=12,
        max_model_len=768,
    )
    assert (found["v2"], found["async"]) == (runner.v2, runner.asynchronous)
    assert sum(batch["preemptions"] for batch in found["batches"]) > 0
    hits = [hit for batch in found["batches"] for output in batch["outputs"] for hit in output["hits"]]
    assert sum(hit > 0 for hit in hits) > runner.some(10)
    assert found["batches"][-1]["outputs"][0]["hits"][0] > 250  # the prompt of the turn before, after its trim
    assert found["free_blocks"] == found["blocks"] - 1  # all but the null block
    assert finite(found)
    count, ties = compare_all(subject, UNEVEN, rule, batches, found)
    assert count > runner.some(1500)
    print(f"{count} tokens equal the simulation's, {ties} of them near ties")


@on(V1, V2)
@pytest.mark.parametrize(
    ("heads", "rule", "prefix_caching"),
    [
        (SPARSE, TrimRule(40, 100, 64), False),
        (UNEVEN, TrimRule(0, 1, 64), True),
        (UNEVEN, TrimRule(1, 33, 96, SLIDING), True),
    ],
    ids=["sparse-64", "no-sinks-64", "odd-96"],
)
def test_block_sizes_and_memory(subject, tmp_path, heads, rule, prefix_caching, runner):
    """Requests hold what the rule says, block by block, in every step; the same tokens as the simulation's."""
    rng = random.Random(f"blocks:{rule}")
    batches = [draw_batch(rng, runner.some(10)), [(draw(rng, 500), 90)]]
    found = serve(
        subject,
        batches,
        runner.environment(write_budget(tmp_path / "b.json", subject, heads, rule)),
        every_step=True,
        window=rule.window,
        block_size=rule.block_tokens,
        enable_prefix_caching=prefix_caching,
    )
    assert {kind for kind, _ in found["groups"]} == {"StreamSpec", "FullAttentionSpec"}
    assert found["reclaimed"]["reported"] == found["reclaimed"]["counted"] > 0
    for batch, results in zip(batches, found["batches"], strict=True):
        for (prompt, _), output in zip(batch, results["outputs"], strict=True):
            for (start_at, tokens), held in zip(output["chunks"][0], output["held"], strict=True):
                processed = start_at + tokens
                whole = -(-processed // rule.block_tokens)
                first_recent = rule.first_recent_block(start_at, len(prompt))
                freed = first_recent - rule.sink_blocks if start_at >= len(prompt) else 0
                expected = {"FullAttentionSpec": whole, "StreamSpec": whole - freed}
                assert held == [expected[kind] for kind, _ in found["groups"]]
    assert finite(found)
    compare_all(subject, heads, rule, batches, found)


@on(V1, V2)
def test_sliding_layers_stay_as_they_are(tmp_path, runner):
    """A Gemma-like model: only its full-attention layer is split, and the others' caches share the pool."""
    subject = make_subject(tmp_path / "gemma", "gemma3", num_hidden_layers=7)
    slides = [kind == "sliding_attention" for kind in subject.geometry.layer_types]
    heads = [[None] * 4 if sliding else [1.0, 0.0, 1.0, 0.0] for sliding in slides]
    rng, rule = random.Random("sliding"), TrimRule(16, 40, 32)
    batches = [draw_batch(rng, 8), [(draw(rng, 300), 40)]]
    batches.append([(batches[1][0][0] + draw(rng, 5), 20)])
    found = serve(
        subject,
        batches,
        runner.environment(write_budget(tmp_path / "b.json", subject, heads, rule)),
        max_num_batched_tokens=128,
    )
    assert {kind for kind, _ in found["groups"]} == {"StreamSpec", "FullAttentionSpec", "SlidingWindowSpec"}
    assert found["batches"][2]["outputs"][0]["hits"] == [288]
    compare_all(subject, heads, rule, batches, found)


STATEFUL = {
    "granitemoehybrid": {"mamba_d_head": 64},
    "nemotron_h": {
        "mamba_head_dim": 64,  # vLLM's CPU backend has no experts with an activation without gate
        "layers_block_type": ["mamba", "mlp", "attention", "mamba", "mlp", "attention", "mamba", "mlp"],
    },
}
"""Of the classes with states that vLLM 0.32 has, those whose tokens on its CPU backend are transformers' in float32."""


@pytest.mark.parametrize("family", STATEFUL)
@pytest.mark.skipif(HERE != STATE_RELEASE, reason="other releases refuse such models")
def test_layers_that_keep_a_state_stay_as_they_are(family, tmp_path):
    """Their states share the pool with split layers, through prefill in chunks, preemptions and poisoned blocks."""
    layers = HYBRIDS[family][1]["num_hidden_layers"]
    subject = make_subject(tmp_path / family, family, hidden_size=256, num_hidden_layers=layers, **STATEFUL[family])
    rows = iter(([1.0, 0.0, 0.0, 1.0], [0.0, 1.0, 0.0, 0.0]))
    heads = [next(rows) if kind == FULL_ATTENTION else [None] * 4 for kind in subject.geometry.layer_types]
    rng, rule = random.Random(family), TrimRule(16, 64, 64)  # vLLM widens blocks to 64 tokens, so that a state fits
    batches = [draw_batch(rng, 30), [(draw(rng, 300), 70)]]
    found = serve(
        subject,
        batches,
        environment(write_budget(tmp_path / "b.json", subject, heads, rule), LLM_KVZIP_POISON="1"),
        enable_prefix_caching=False,
        num_gpu_blocks_override=44,
        max_model_len=768,
        max_num_batched_tokens=128,
    )
    assert {kind for kind, _ in found["groups"]} == {"StreamSpec", "FullAttentionSpec", "MambaSpec"}
    assert found["reclaimed"]["reported"] == found["reclaimed"]["counted"] > 0
    assert sum(batch["preemptions"] for batch in found["batches"]) > 0
    assert found["free_blocks"] == found["blocks"] - 1
    assert finite(found)
    count, ties = compare_all(subject, heads, rule, batches, found)
    assert count > 400
    print(f"{count} tokens equal the simulation's, {ties} of them near ties")


@on(V1, V2)
def test_a_view_that_is_not_trimmed_shows(subject, tmp_path, runner):
    """A worker that reads what was freed says NaN where that is poisoned, and other tokens where it is not."""
    rule = TrimRule(16, 64, 32)
    env = runner.environment(write_budget(tmp_path / "b.json", subject, UNEVEN, rule), SABOTAGE_VIEW="whole-view")
    rng = random.Random("sabotage")
    batches = [[(draw(rng, count), 8) for count in (400, 300)]]
    found = serve(subject, batches, env, enable_prefix_caching=False)
    if runner.v2:
        with pytest.raises(AssertionError, match=r"below the best|log-probability"):
            compare_all(subject, UNEVEN, rule, batches, found, close=CLOSE)
    else:
        assert not finite(found)


@on(V1, V2)
def test_off_and_retention_one_are_stock(subject, tmp_path, runner):
    """Without the toggle vLLM's functions are the originals; with every head full no layer is split."""
    rng = random.Random("stock")
    batches = [draw_batch(rng, runner.some(12))]
    stock = serve(subject, batches, runner.environment())
    budget = write_budget(tmp_path / "b.json", subject, FULL, TrimRule(16, 64, 32))
    whole = serve(subject, batches, runner.environment(budget, LLM_KVZIP_POISON="0"))
    assert stock["batches"] == whole["batches"]
    assert stock["groups"] == whole["groups"] == [["FullAttentionSpec", 4]]
    assert stock["patched"] == []
    assert stock["runtime_modules"] == ["kvprofile.runtime", "kvprofile.runtime.gate"]
    groups_in = "kv_cache_utils" if HERE < "0.33" else "kv_cache_planning"
    assert sorted(whole["patched"]) == [
        "Attention.__init__",
        "BaseModelLoader.create_model",
        "EngineArgs.create_engine_config",
        "GPUModelRunner._build_attention_metadata",
        "GPUModelRunner._update_states",
        "GPUModelRunner.initialize_kv_cache",
        "GPUModelRunner.initialize_kv_cache",  # of model runner V2
        "GPUModelRunner.prepare_attn",
        "GPUModelRunner.update_requests",
        "InputProcessor.process_inputs",
        "MultiProcessCollector.collect",
        "Scheduler.schedule",
        f"vllm.v1.core.{groups_in}.get_kv_cache_groups",
    ]


@pytest.mark.slow
def test_budgets_do_not_share_compiled_graphs(subject, tmp_path):
    """Off, one budget, another, and the first again, with torch.compile and one cache folder."""
    rule = TrimRule(16, 64, 32)
    batches = [draw_batch(random.Random("compiled"), 6)]
    first = write_budget(tmp_path / "first.json", subject, UNEVEN, rule)
    second = write_budget(tmp_path / "second.json", subject, [row[::-1] for row in SPARSE], rule)
    for heads, budget in (
        (FULL, None),
        (UNEVEN, first),
        ([row[::-1] for row in SPARSE], second),
        (UNEVEN, first),
    ):
        env = environment(budget, VLLM_CACHE_ROOT=str(tmp_path / "cache"))
        found = serve(subject, batches, env, enforce_eager=False)
        compare_all(subject, heads, rule, batches, found)


def save_config(folder, name, **shape):
    """A folder with a model's config and no weights, which refusals come before."""
    getattr(transformers, name)(**shape, architectures=[name.replace("Config", "ForCausalLM")]).save_pretrained(folder)
    return str(folder)


REFUSALS = """
import json, os, sys
cases = json.loads(sys.stdin.read())
from vllm.engine.arg_utils import EngineArgs
for settings, model, arguments in cases:
    for name in [name for name in os.environ if name.startswith("LLM_KVZIP_")]:
        del os.environ[name]
    os.environ.update(LLM_KVZIP_ENABLED="1", **settings)
    try:
        EngineArgs(model, max_model_len=512, skip_tokenizer_init=True, **arguments).create_engine_config()
    except Exception as error:
        print("REFUSED", json.dumps([type(error).__name__, str(error)]))
    else:
        print("REFUSED", json.dumps(None))
"""
"""Every refusal happens where vLLM makes its configuration: in the parent, before any engine is built."""


_STATES = {
    "num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 2, "mamba_n_heads": 2, "mamba_d_head": 64,
    "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip
_CONVOLUTIONS = {"num_attention_heads": 2, "num_key_value_heads": 2, "layer_types": ["conv", "full_attention"]}


def test_blocks_are_poisoned_where_workers_know_the_marks(monkeypatch):
    from kvprofile.runtime import configure

    v1, v2 = (SimpleNamespace(use_v2_model_runner=which) for which in (False, True))
    assert configure.can_poison(v1)
    assert not configure.can_poison(v2)
    monkeypatch.setattr(configure, "current_platform", SimpleNamespace(device_type="cuda"))
    assert not configure.can_poison(v1)


def test_what_groups_caches_itself_is_refused(monkeypatch):
    """Interfaces of vLLM 0.33, as its documentation describes them."""
    from kvprofile.runtime import configure

    for name, refused in (("vllm.v1.core.kv_cache_planning.DefaultKVCacheConfigBuilder", False), ("a.Builder", True)):
        platform = SimpleNamespace(get_kv_cache_config_builder_cls=lambda _, name=name: name)
        monkeypatch.setattr(configure, "current_platform", platform)
        assert configure._groups_itself(None) is refused
    monkeypatch.setattr(configure, "current_platform", SimpleNamespace())
    assert not configure._groups_itself(None)


@pytest.mark.parametrize(
    ("sizes", "tokens", "listed"),
    [
        ([16, 32, 64], 48, "16 or 32 or 64"),
        ([MultipleOf(16)], 24, "a multiple of 16"),
        ([16, 32, 64], 32, None),
        ([MultipleOf(16)], 48, None),
        ([], 48, None),
    ],
)
def test_blocks_that_kernels_do_not_read_whole_are_refused(sizes, tokens, listed):
    from kvprofile.runtime.backend import blocks_refused

    backend = SimpleNamespace(get_supported_kernel_block_sizes=lambda: sizes, get_name=lambda: "ANY")
    expected = f"blocks of {tokens} tokens in attention backend ANY; set --block-size to {listed}"
    assert blocks_refused(backend, tokens) == (expected if listed else None)


def test_refusals_name_the_reason(subject, tmp_path):
    rule = TrimRule(16, 64, 32)
    good = str(write_budget(tmp_path / "good.json", subject, UNEVEN, rule))
    other = str(write_budget(tmp_path / "other.json", subject, UNEVEN, rule, name="somebody/else"))
    broken = tmp_path / "broken.json"
    broken.write_text(json.dumps({"format": "kvprofile-runtime", "version": 1}))
    (tmp_path / "empty").mkdir()
    ranks = {"kv_lora_rank": 32, "q_lora_rank": None, "qk_nope_head_dim": 32, "qk_rope_head_dim": 32, "v_head_dim": 32}
    latent = save_config(tmp_path / "mla", "DeepseekV2Config", num_hidden_layers=2, hidden_size=64, **ranks)
    sinks = save_config(tmp_path / "sinks", "GptOssConfig", num_hidden_layers=2, hidden_size=64, head_dim=32)
    alibi = save_config(tmp_path / "alibi", "BloomConfig", n_layer=2, hidden_size=64, n_head=2)
    states = save_config(tmp_path / "states", "GraniteMoeHybridConfig", **_STATES)
    convolutions = save_config(tmp_path / "lfm2", "Lfm2Config", num_hidden_layers=2, hidden_size=64, **_CONVOLUTIONS)
    experts = save_config(
        tmp_path / "experts", "Qwen3MoeConfig", num_hidden_layers=2, hidden_size=64, num_attention_heads=2,
        num_key_value_heads=2, num_experts=4,
    )  # fmt: skip
    connector = {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}
    plain, found = str(subject.folder), {"LLM_KVZIP_BUDGET": good}
    drafts = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}
    cases = [
        ({"LLM_KVZIP_BUDGET": other}, plain, {}, "is for somebody/else"),
        ({"LLM_KVZIP_BUDGET": str(broken)}, plain, {}, "full_heads: Field required"),
        ({"LLM_KVZIP_BUDGET": str(tmp_path / "none.json")}, plain, {}, "none.json"),
        ({"LLM_KVZIP_BUDGET_DIR": str(tmp_path / "empty")}, plain, {}, "no budget for"),
        ({"LLM_KVZIP_BUDGET": good, "LLM_KVZIP_RETENTION": "2"}, plain, {}, "LLM_KVZIP_RETENTION is '2'"),
        (found, latent, {}, "multi-head latent attention (MLA)"),
        (found, sinks, {}, "learned attention sinks"),
        (found, alibi, {}, "ALiBi"),
        (found, plain, {"kv_cache_dtype": "int8_per_token_head"}, "quantised KV cache int8_per_token_head"),
        (found, plain, {"kv_cache_dtype": "fp8", "kv_cache_dtype_skip_layers": ["0"]}, "kv_cache_dtype_skip_layers"),
        (found, plain, {"kv_cache_dtype": "fp8_e4m3"}, None),
        (found, plain, {"scheduler_reserve_full_isl": False}, "scheduler_reserve_full_isl off"),
        (found, plain, {"speculative_config": drafts}, "speculative decoding"),
        (found, plain, {"kv_transfer_config": connector}, "a KV connector"),
        (found, plain, {"tensor_parallel_size": 8, "decode_context_parallel_size": 2}, "context parallelism"),
        (found, plain, {"disable_hybrid_kv_cache_manager": True}, "serve with --disable-hybrid-kv-cache-manager"),
        (found, plain, {"pipeline_parallel_size": 2}, "pipeline parallelism"),
        (found, plain, {"data_parallel_size": 2}, None if HERE == STATE_RELEASE else "or on another vLLM than"),
        (
            found,
            experts,
            {"data_parallel_size": 2},
            "data parallelism of a mixture of experts, over Ray",
        ),
        (found, plain, {"enable_lora": True}, "LoRA adapters, unless LLM_KVZIP_ALLOW_UNTESTED=lora"),
        (found | {"LLM_KVZIP_ALLOW_UNTESTED": "platform"}, plain, {"enable_lora": True}, "LoRA adapters"),
        (found | {"LLM_KVZIP_ALLOW_UNTESTED": "lora"}, plain, {"enable_lora": True}, None),
        (
            found,
            plain,
            {"attention_backend": "TRITON_ATTN", "block_size": 24},
            "blocks of 24 tokens in attention backend TRITON_ATTN; set --block-size to a multiple of 16",
        ),
        (found, states, {}, "prefix caching of a model with layers that keep a state; add --no-enable-prefix-caching"),
        (found, convolutions, {"enable_prefix_caching": False}, "layers that keep a state in a model of type lfm2"),
        (found, plain, {}, None),
    ]
    run = subprocess.run(
        [sys.executable, "-c", REFUSALS],
        input=json.dumps([case[:3] for case in cases]),
        env=environment(good),
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    lines = [line.removeprefix("REFUSED") for line in run.stdout.splitlines() if line.startswith("REFUSED")]
    for (*_, expected), line in zip(cases, lines, strict=True):
        found = json.loads(line)
        if expected is None:
            assert found is None
            continue
        kind, message = found
        assert kind in ("ValueError", "InputError"), found
        assert expected in message
        assert "\n" not in message
