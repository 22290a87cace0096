"""Caches of 8-bit floats: how vLLM's CPU backend stores numbers, and whose scales the parts of a layer use."""

from __future__ import annotations

import json
import random
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from kvprofile.budget.dtypes import FLOAT8_NAMES
from kvprofile.budget.float8 import of_cache
from kvprofile.budget.trim import TrimRule
from tests.vllm.engine import UNEVEN, draw_batch, environment, job, make_subject, serve_all, write_budget

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm

CACHE_SCHEME = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
SCALES = {"k_scale": 0.031, "v_scale": 0.0023}


@pytest.mark.parametrize("name", FLOAT8_NAMES)
@pytest.mark.parametrize("scale", [1.0, 0.037])
def test_every_number_is_stored_as_the_simulation_says(name, scale):
    """All of bfloat16's, by the write that vLLM's CPU backend uses."""
    from vllm import _custom_ops as ops
    from vllm.platforms import current_platform

    current_platform.import_kernels()
    numbers = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16)
    numbers = numbers.where(numbers.isfinite(), torch.zeros((), dtype=torch.bfloat16)).view(-1, 1, 64)
    cache = torch.zeros(len(numbers) // 32, 1, 64, 64, dtype=torch.uint8)
    keys, values = cache.chunk(2, dim=2)
    slots = torch.arange(len(numbers))
    ops.cpu_attn_reshape_and_cache(
        numbers, numbers, keys, values, slots, "vec", k_scale=scale, v_scale=scale, kv_cache_dtype=name
    )
    rule = of_cache(name, "cpu")
    assert torch.equal(rule.read(values.reshape(numbers.shape)), rule.read(rule.stored(numbers, scale)))


def test_parts_take_over_the_scales_of_their_layer(monkeypatch):
    from vllm.model_executor.layers.attention import Attention
    from vllm.model_executor.layers.attention.attention import set_default_quant_scales

    from kvprofile.runtime.layer import SplitAttention

    def module():
        made = torch.nn.Module()
        set_default_quant_scales(made, register_buffer=True)
        return made

    def load(self, _dtype):
        for number, name in enumerate(("q", "k", "v", "prob"), 1):
            getattr(self, f"_{name}_scale").fill_(number / 8)
            setattr(self, f"_{name}_scale_float", number / 8)
        self._k_scale_cpu.fill_(2 / 8)
        self._v_scale_cpu.fill_(3 / 8)

    monkeypatch.setattr(Attention, "process_weights_after_loading", load)
    layer = module()
    layer.full, layer.stream = module(), module()
    layer.parts = tuple(SimpleNamespace(part=name) for name in ("full", "stream"))
    layer.__class__ = SplitAttention
    layer.process_weights_after_loading(torch.float32)
    for part in (layer.full, layer.stream):
        tensors = [float(getattr(part, f"_{name}_scale")) for name in ("q", "k", "v", "prob")]
        floats = [getattr(part, f"_{name}_scale_float") for name in ("q", "k", "v", "prob")]
        assert tensors == floats == [1 / 8, 2 / 8, 3 / 8, 4 / 8]
        assert (float(part._k_scale_cpu), float(part._v_scale_cpu)) == (2 / 8, 3 / 8)


@pytest.mark.slow
def test_a_checkpoint_with_scales_is_served_as_stock_serves_it(tmp_path):
    """Split layers of which nothing is trimmed: stock's tokens, with the checkpoint's scales, which are not 1."""
    subject = make_subject(tmp_path / "tiny")
    plain = subject.folder / "model.safetensors"
    weights = load_file(plain)
    for layer in range(4):
        for name, value in SCALES.items():
            weights[f"model.layers.{layer}.self_attn.{name}"] = torch.tensor([value])
    save_file(weights, plain, metadata={"format": "pt"})
    config = json.loads((subject.folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors", "format": "dense", "quantization_status": "frozen", "config_groups": {},
        "ignore": [], "kv_cache_scheme": CACHE_SCHEME,
    }  # fmt: skip
    (subject.folder / "config.json").write_text(json.dumps(config))
    batches = [draw_batch(random.Random("scales"), 8)]
    budget = write_budget(tmp_path / "b.json", subject, UNEVEN, TrimRule(16, 4096, 32))
    (stock,), _ = serve_all([job(subject, batches, kv_cache_dtype="fp8")], environment())
    (split,), _ = serve_all([job(subject, batches, budget, kv_cache_dtype="fp8")], environment(budget))
    assert split["groups"] != stock["groups"]
    for one, other in zip(stock["batches"][0]["outputs"], split["batches"][0]["outputs"], strict=True):
        assert one["tokens"][:20] == other["tokens"][:20]
