"""Scores from inside vLLM are those of the Hugging Face engine, whatever its cache and scheduler do meanwhile."""

from __future__ import annotations

import pytest
from transformers import AutoModelForCausalLM

from tests.helpers.models import POCKET, random_model
from tests.vllm.capture import TOLERANCE, case_of, draw_documents, hf_scores, run_cases, worst_difference

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm

SHAPE = {"head_dim": 32, "num_attention_heads": 8, "num_key_value_heads": 4, "num_hidden_layers": 4}
FAMILIES = {
    "llama": SHAPE,
    "qwen2": {**SHAPE, "hidden_size": 256},  # its heads are as wide as the hidden size says
    "qwen3": SHAPE,
    "gemma2": {"num_key_value_heads": 2},  # soft caps, and layers that slide
}
WITH = {
    "llama": (("block_size=32", "max_num_batched_tokens=70"), ("block_size=64",)),
    "qwen2": (("block_size=64", "max_num_batched_tokens=70"),),
    "qwen3": (("block_size=32", "max_num_batched_tokens=70"),),
    "gemma2": (("block_size=32", "max_num_batched_tokens=100"),),
    "pocket": (("block_size=32",), ("block_size=64", "max_num_batched_tokens=70")),
}
"""vLLM's arguments for each family: prefills are cut into steps where they are limited to so many tokens."""

CASES = [(family, arguments) for family, each in WITH.items() for arguments in each]
CHUNK = 60


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Random checkpoints of several families, and the bundled one."""
    found = {}
    for family, changes in FAMILIES.items():
        model = random_model(family, **changes)
        folder = tmp_path_factory.mktemp("capture") / family
        model.save_pretrained(folder)
        found[family] = (model.eval(), folder)
    pocket = AutoModelForCausalLM.from_pretrained(POCKET, dtype="float32").eval()
    return found | {"pocket": (pocket, POCKET)}


DOCUMENTS = draw_documents("capture", (277, 61, 190))
LONG = draw_documents("long", (500,))


@pytest.fixture(scope="module")
def results(models, tmp_path_factory):
    """Every case, one engine after the other in one process, because most of the time is vLLM's import."""
    folder = tmp_path_factory.mktemp("scores")

    def case(name, family, documents=DOCUMENTS, **others):
        named[name] = case_of(models[family][1], documents, CHUNK, folder / f"{len(named)}.safetensors", **others)
        return named[name]

    named = {}
    for family, arguments in CASES:
        case((family, arguments), family, arguments=arguments, look=(family, arguments) == CASES[0])
    small = ("block_size=32", "num_gpu_blocks_override=22", "max_num_batched_tokens=100")
    case("evicted", "llama", LONG, arguments=small, disturb=570)
    stock = case("stock scheduler", "llama", arguments=("block_size=32",), request_tokens=100)
    del stock["engine"]["scheduler_cls"]
    return dict(zip(named, run_cases(list(named.values())), strict=True))


@pytest.mark.parametrize(
    ("family", "arguments"), CASES, ids=lambda value: value if isinstance(value, str) else " ".join(value)
)
def test_scores_equal_the_hf_engine(models, results, family, arguments, capsys):
    """Several documents and chunks, block sizes 32 and 64, prefills cut into steps."""
    found = results[family, arguments]
    worst = worst_difference(hf_scores(*models[family], DOCUMENTS, CHUNK), found["scores"])
    with capsys.disabled():
        print(f" worst difference {worst:.1e}", end="")
    assert worst < TOLERANCE
    assert found["backends"] == ["CPU_ATTN"]
    assert f"block_size={found['block_tokens']}" in arguments
    assert found["shortcuts"] == 0
    assert not any(fresh for _, _, fresh in found["cached"])
    if family != "gemma2":  # a hit also needs the window of sliding layers, whose blocks are not kept
        assert found["evictions"] == 0
        whole = [read - read % found["block_tokens"] for read in (279, 63, 192)]
        assert {cached for _, cached, _ in found["cached"]} == {0, *whole}


def test_an_evicted_context_is_read_again(models, results, capsys):
    """Between any two requests a stranger's fills the pool: the context is gone, and scores are right."""
    found = results["evicted"]
    repeats = found["cached"][1:]
    assert any(cached < 480 for _, cached, _ in repeats), "nothing was evicted, so nothing is tested"
    assert found["evictions"] == sum(cached < 480 for _, cached, _ in repeats)
    worst = worst_difference(hf_scores(*models["llama"], LONG, CHUNK), found["scores"])
    with capsys.disabled():
        print(f" {found['evictions']} evictions, worst difference {worst:.1e}", end="")
    assert worst < TOLERANCE


def test_rows_found_in_the_cache_are_computed_again(models, results):
    """With vLLM's own scheduler a repeat finds the rows that it shares with the one before; none may be left out."""
    found = results["stock scheduler"]
    assert found["shortcuts"] > 0
    assert sum(fresh for _, _, fresh in found["cached"]) == found["shortcuts"]
    assert worst_difference(hf_scores(*models["llama"], DOCUMENTS, CHUNK), found["scores"]) < TOLERANCE


def test_off_costs_nothing(results):
    """Before and after a session every function that it watches is vLLM's own, on the objects that were watched."""
    found = results[CASES[0]]
    assert found["before"]["own"]
    assert not found["during"]["own"]
    assert found["after"] == found["before"]


@pytest.mark.slow
def test_compiled_models_are_watched_too(models, tmp_path):
    """Under torch.compile attention stays one opaque operation, which looks its layer up when it runs."""
    case = case_of(models["llama"][1], DOCUMENTS, CHUNK, tmp_path / "scores.st", arguments=("enforce_eager=false",))
    (found,) = run_cases([case], VLLM_CPU_CI_ENV="1")  # traced by dynamo, not compiled: that takes minutes
    assert worst_difference(hf_scores(*models["llama"], DOCUMENTS, CHUNK), found["scores"]) < TOLERANCE
