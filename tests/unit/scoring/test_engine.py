"""Which engine scores, and why."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from kvprofile.checkpoint.quantisation import quantisation_of
from kvprofile.errors import InputError
from kvprofile.scoring import engine


def description(keeps_states=False, **config):
    stated = SimpleNamespace(**config)
    source = SimpleNamespace(gguf=None, name="some/model")
    found = quantisation_of(Path("nowhere"), stated)
    return SimpleNamespace(config=stated, source=source, quantisation=found, keeps_states=keeps_states)


INT8 = {"quant_method": "compressed-tensors"}


@pytest.mark.parametrize(
    ("asked", "config", "method", "installed", "expected", "words"),
    [
        ("auto", {}, "kvzip", True, "hf", "exact on any machine"),
        ("auto", {"quantization_config": INT8}, "kvzip", True, "vllm", "quantised (compressed-tensors)"),
        ("auto", {"quantization_config": INT8}, "kvzip", False, "hf", "vLLM is not installed here"),
        ("auto", {"quantization_config": INT8}, "gate", True, "hf", "--method gate needs gradients"),
        ("auto", {"quantization_config": INT8, "keeps_states": True}, "kvzip", True, "hf", "some layers keep a state"),
        ("hf", {"quantization_config": INT8}, "kvzip", True, "hf", "asked for"),
        ("vllm", {}, "kvzip-mean", True, "vllm", "asked for"),
    ],
)
def test_the_engine_is_chosen_with_a_reason(asked, config, method, installed, expected, words, monkeypatch):
    monkeypatch.setattr(engine, "vllm_is_installed", lambda: installed)
    chosen, reason = engine.choose_engine(asked, description(**config), method)
    assert chosen == expected
    assert words in reason


@pytest.mark.parametrize(
    ("asked", "method", "installed", "words"),
    [
        ("tgi", "kvzip", True, "known: auto, hf, vllm"),
        ("vllm", "gate", True, "--method gate needs gradients"),
        ("vllm", "kvzip", False, "not installed here"),
    ],
)
def test_engines_that_cannot_score_are_refused(asked, method, installed, words, monkeypatch):
    monkeypatch.setattr(engine, "vllm_is_installed", lambda: installed)
    with pytest.raises(InputError, match=words):
        engine.choose_engine(asked, description(), method)


@pytest.mark.parametrize(("asked", "method"), [("vllm", "kvzip"), ("hf", "gate"), ("auto", "ablation")])
def test_models_with_states_run_on_transformers_and_by_methods_without_gates(asked, method, monkeypatch):
    monkeypatch.setattr(engine, "vllm_is_installed", lambda: True)
    with pytest.raises(InputError, match="does not run some/model, some layers of which keep a state"):
        engine.choose_engine(asked, description(keeps_states=True), method)
