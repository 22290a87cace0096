"""Which engine scores, and why."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from kvprofile.checkpoint.quantisation import quantisation_of
from kvprofile.errors import InputError
from kvprofile.scoring import engine


def description(**config):
    stated = SimpleNamespace(**config)
    source = SimpleNamespace(gguf=None)
    return SimpleNamespace(config=stated, source=source, quantisation=quantisation_of(Path("nowhere"), stated))


INT8 = {"quant_method": "compressed-tensors"}


@pytest.mark.parametrize(
    ("asked", "config", "method", "installed", "expected", "words"),
    [
        ("auto", {}, "kvzip", True, "hf", "exact on any machine"),
        ("auto", {"quantization_config": INT8}, "kvzip", True, "vllm", "quantised (compressed-tensors)"),
        ("auto", {"quantization_config": INT8}, "kvzip", False, "hf", "vLLM is not installed here"),
        ("auto", {"quantization_config": INT8}, "gate", True, "hf", "--method gate needs gradients"),
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
