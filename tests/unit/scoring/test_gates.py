"""Gates against a naive model: the whole sequence at once, a mask for every head, no cache, float64, no shared code."""

from __future__ import annotations

import copy
from functools import cache

import pytest
import torch
import transformers
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from kvprofile.budget.profile import Geometry
from kvprofile.budget.trim import SLIDING, TrimRule
from kvprofile.checkpoint import Source, describe
from kvprofile.corpus.generate import generate_text
from kvprofile.errors import InputError
from kvprofile.scoring import gates as gates_module
from kvprofile.scoring import kernels
from kvprofile.scoring.attention import recording
from kvprofile.scoring.gates import ablation_scores, gate_scores, gating, greedy
from kvprofile.scoring.prompts import chat_frame, chunks, encode, frame_document
from tests.helpers.models import random_model

RULE = TrimRule(sink_tokens=5, recent_tokens=11, block_tokens=1, window=SLIDING)
CONTEXT, CHUNK = 70, 45
FAMILIES = ["llama", "qwen2", "qwen3", "mistral", "phi3", "gemma2", "gemma3", "qwen3_moe", "afmoe", "gpt_oss"]
KERNEL_CASES = ["llama", "gemma2", "gpt_oss"]
"""All that attention itself can meet: plain; a capped logit and sliding layers; learned sinks and sliding layers."""


class Case:
    """A tiny model, its geometry, and a framed document of two chunks."""

    def __init__(self, model, tokenizer, tmp_path, tokens=CONTEXT):
        model.save_pretrained(tmp_path)
        self.model, self.geometry = model, describe(Source("test", tmp_path, None)).geometry
        self.frame = chat_frame(tokenizer)
        self.document = frame_document("test", encode(tokenizer, generate_text("prose", 7, 4000))[:tokens], self.frame)
        self.chunks = list(chunks(self.document, self.frame, CHUNK))
        self.prefill = (*self.document.prefix_ids, *self.document.context_ids)

    def gating(self, rule=RULE, model=None, **options):
        sizes = {"document_tokens": len(self.prefill), "chunk_tokens": CHUNK, **options}
        return gating(model or self.model, self.geometry, rule, self.frame, **sizes)

    def gates(self, seed=0):
        shape = (len(self.geometry.profiled_layers), self.geometry.kv_heads)
        found = torch.rand(shape, generator=torch.Generator().manual_seed(seed))
        found.view(-1)[0], found.view(-1)[-1] = 0.0, 1.0
        return found

    def naive(self, rule=RULE):
        return Naive(self.model, self.geometry, self.prefill, rule)


class Naive:
    def __init__(self, model, geometry, prefill, rule):
        self.model = copy.deepcopy(model).double()
        self.model.set_experts_implementation("eager")  # others multiply in float32 at most
        self.geometry, self.prefill, self.rule = geometry, prefill, rule
        self.kept = cache(self._kept)  # every layer of every pass asks for the same mask, and plain Python is slow

    def _kept(self, n):
        """Whether row i sees key j where its head is trimmed [n, n], by the rule's own definition."""
        first = len(self.prefill)
        return torch.tensor([[i < first or self.rule.sees(i, j, 0) for j in range(n)] for i in range(n)])

    def attention(self, module, query, key, value, _mask=None, scaling=None, **options):
        _, heads, n, _ = query.shape
        group = heads // key.shape[1]
        key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
        logits = query.double() @ key.double().transpose(-1, -2) * (scaling or query.shape[-1] ** -0.5)
        if options.get("softcap"):
            logits = torch.tanh(logits / options["softcap"]) * options["softcap"]
        seen = torch.ones(n, n, dtype=torch.bool).tril()

        def output(seen):
            hidden = logits.masked_fill(~seen, -torch.inf)
            if options.get("s_aux") is not None:
                sinks = options["s_aux"].double()[None, :, None, None].expand(1, heads, n, 1)
                hidden = torch.cat([hidden, sinks], -1)
            return hidden.softmax(-1)[..., :n] @ value.double()

        profiled = self.geometry.profiled_layers
        if module.layer_idx not in profiled:
            slides = output(seen & seen.T.tril(options["sliding_window"] - 1).T)
            return slides.transpose(1, 2).to(query.dtype).contiguous(), None
        gates = self.gates[profiled.index(module.layer_idx)].repeat_interleave(group)[None, :, None, None]
        mixed = gates * output(seen) + (1 - gates) * output(seen & self.kept(n))
        return mixed.transpose(1, 2).to(query.dtype).contiguous(), None

    def loss(self, chunk, gates):
        with torch.no_grad():
            return self._loss(chunk, gates.double()).item()

    def gradient(self, chunk, gates):
        gates = gates.double().requires_grad_()
        return torch.autograd.grad(self._loss(chunk, gates), gates)[0]

    def differences(self, chunk, gates, step=1e-3):
        """Finite differences; norms and rotations are float32 in any model, so steps must not be small."""
        found = torch.zeros(gates.numel(), dtype=torch.double)
        for head in range(gates.numel()):
            up, down = gates.double().flatten(), gates.double().flatten()
            up[head] += step
            down[head] -= step
            rise = self.loss(chunk, up.view_as(gates)) - self.loss(chunk, down.view_as(gates))
            found[head] = rise / (2 * step)
        return found.view_as(gates)

    def _loss(self, chunk, gates):
        self.gates = gates
        AttentionInterface.register("naive", self.attention)
        AttentionMaskInterface.register("naive", lambda *_, **__: None)
        self.model.set_attn_implementation("naive")
        try:
            return plain_loss(self.model, self.prefill, chunk)
        finally:
            for registry in (AttentionInterface, AttentionMaskInterface):
                registry._global_mapping.pop("naive")


def plain_loss(model, prefill, chunk):
    ids = (*prefill, *chunk.repeat_ids)
    logits = model(torch.tensor([ids]), use_cache=False).logits[0].double()
    tokens = chunk.stop - chunk.start
    return torch.nn.functional.cross_entropy(logits[-tokens - 1 : -1], torch.tensor(ids[-tokens:]))


@pytest.fixture(scope="module", params=FAMILIES)
def case(request, tokenizer, tmp_path_factory):
    caps = {"attn_logit_softcapping": 3.0} if request.param == "gemma2" else {}  # low enough to bend slopes
    return Case(random_model(request.param, **caps), tokenizer, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def llama(tokenizer, tmp_path_factory):
    return Case(random_model("llama"), tokenizer, tmp_path_factory.mktemp("llama"))


def test_loss_and_gradient_equal_the_naive_ones(case):
    naive, gates = case.naive(), case.gates()
    with case.gating() as gated:
        assert gated.prefill(case.document) == case.chunks
        for chunk in case.chunks:
            expected = naive.loss(chunk, gates)
            loss, gradient = gated.loss_and_gradient(chunk, gates)
            assert loss == pytest.approx(expected, abs=1e-5)
            assert gated.loss(chunk, gates) == pytest.approx(expected, abs=1e-5)
            slopes = naive.gradient(chunk, gates)
            assert (gradient - slopes).abs().max() < 1e-5
            assert slopes.abs().max() > 1e-3, "gates without effect would make this comparison empty"
    if not hasattr(case.model.config, "num_experts_per_tok"):  # a step can change which experts a token takes
        # The naive gradient is autograd's too; this asks nobody's. One chunk is enough: two passes for each head.
        assert (gradient - naive.differences(chunk, gates)).abs().max() < 1e-5


def test_open_gates_are_the_plain_model(case):
    with case.gating() as gated:
        gated.prefill(case.document)
        open_gates = gated.gates()
        found = [(gated.loss(c, open_gates), gated.loss_and_gradient(c, open_gates)[0]) for c in case.chunks]
    for chunk, (loss, again) in zip(case.chunks, found, strict=True):
        assert loss == pytest.approx(plain_loss(case.model, case.prefill, chunk).item(), abs=1e-5)
        assert again == pytest.approx(loss, abs=1e-6)


def test_checkpointing_does_not_change_gradients(case):
    found = []
    for checkpointing in (True, False):
        with case.gating(checkpointing=checkpointing) as gated:
            gated.prefill(case.document)
            found.append([gated.loss_and_gradient(chunk, case.gates()) for chunk in case.chunks])
    for (loss, gradient), (kept_loss, kept_gradient) in zip(*found, strict=True):
        assert loss == kept_loss
        assert torch.equal(gradient, kept_gradient)


def test_chunks_do_not_disturb_each_other(case):
    with case.gating() as gated:
        gated.prefill(case.document)
        first = [gated.loss_and_gradient(chunk, case.gates()) for chunk in case.chunks]
        again = [gated.loss_and_gradient(chunk, case.gates()) for chunk in reversed(case.chunks)]
    for (loss, gradient), (other_loss, other) in zip(first, reversed(again), strict=True):
        assert loss == other_loss
        assert torch.equal(gradient, other)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_document_leaves_nothing_to_the_next(family, tokenizer, tmp_path):
    case = Case(random_model(family), tokenizer, tmp_path, tokens=200)
    other = frame_document("other", case.document.context_ids[::-1], case.frame)
    found = []
    with case.gating(slice_tokens=30) as gated:
        for document in (case.document, other, case.document):
            found.append([gated.loss_and_gradient(chunk, case.gates()) for chunk in gated.prefill(document)])
    for (loss, gradient), (again, same) in zip(found[0], found[2], strict=True):
        assert loss == again
        assert torch.equal(gradient, same)
    assert found[0][0][0] != found[1][0][0]


@pytest.mark.parametrize("case", KERNEL_CASES, indirect=True)
def test_sizes_of_slices_and_blocks_do_not_change_the_loss(case, monkeypatch):
    naive, gates = case.naive(), case.gates()
    expected = [(naive.loss(chunk, gates), naive.gradient(chunk, gates)) for chunk in case.chunks]
    monkeypatch.setattr(kernels, "ROW_BLOCK", 7)
    monkeypatch.setattr(kernels, "KEY_BLOCK", 13)
    monkeypatch.setattr(gates_module, "VOCABULARY_BLOCK_VALUES", 5000)
    for rows_at_once in (200, 16):
        with case.gating(rows_at_once=rows_at_once, slice_tokens=19) as gated:
            gated.prefill(case.document)
            for chunk, (loss, slopes) in zip(case.chunks, expected, strict=True):
                assert gated.loss(chunk, gates) == pytest.approx(loss, abs=1e-5)
                found, gradient = gated.loss_and_gradient(chunk, gates)
                assert found == pytest.approx(loss, abs=1e-5)
                exact = (gradient - slopes).abs().max() < 1e-5
                assert exact == (rows_at_once == 200), "slices cut gradients, and only slices do"


@pytest.mark.parametrize(("sinks", "recent"), [(0, 1), (90, 20), (400, 5), (3, 400)])
def test_any_rule_equals_the_naive_model(llama, sinks, recent):
    """No sinks, sinks longer than the document, sinks longer than everything, a window longer than everything."""
    rule = TrimRule(sinks, recent, 1, SLIDING)
    naive, gates = llama.naive(rule), llama.gates()
    with llama.gating(rule) as gated:
        gated.prefill(llama.document)
        for chunk in llama.chunks:
            loss, gradient = gated.loss_and_gradient(chunk, gates)
            assert loss == pytest.approx(naive.loss(chunk, gates), abs=1e-5)
            assert gated.loss(chunk, gates) == pytest.approx(loss, abs=1e-6)
            assert (gradient - naive.gradient(chunk, gates)).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("name", "own"),
    [
        ("GraniteConfig", {"logits_scaling": 3.0, "residual_multiplier": 0.7}),
        ("CohereConfig", {"logit_scale": 0.3}),
        ("NanoChatConfig", {"final_logit_softcapping": 4.0}),
    ],
)
def test_logits_are_the_models_own(name, own, tokenizer, tmp_path):
    shape = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 3}
    config = getattr(transformers, name)(vocab_size=1024, intermediate_size=96, **shape, **ids, **own)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    case = Case(model, tokenizer, tmp_path)
    with case.gating() as gated:
        gated.prefill(case.document)
        loss = gated.loss(case.chunks[0], gated.gates())
    assert loss == pytest.approx(plain_loss(model, case.prefill, case.chunks[0]).item(), abs=1e-5)


def test_half_precision_stays_close(llama):
    model = copy.deepcopy(llama.model).bfloat16()
    found = []
    for one in (llama.model, model):
        with llama.gating(model=one) as gated:
            found.append(gate_scores(gated, [llama.document]))
    assert torch.corrcoef(torch.stack([x.flatten() for x in found]))[0, 1] > 0.9


def test_everything_is_put_back(llama):
    model = copy.deepcopy(llama.model)
    model.lm_head.weight.requires_grad_(False)
    wanted = {name: p.requires_grad for name, p in model.named_parameters()}
    registered = set(AttentionInterface._global_mapping), set(AttentionMaskInterface._global_mapping)

    def check():
        assert {name: p.requires_grad for name, p in model.named_parameters()} == wanted
        assert set(wanted.values()) == {True, False}
        assert model.config._attn_implementation == "eager"
        assert (set(AttentionInterface._global_mapping), set(AttentionMaskInterface._global_mapping)) == registered
        assert not any("forward" in vars(module) for module in model.modules())

    with llama.gating(model=model) as gated:
        assert not any(p.requires_grad for p in model.parameters())
        gated.prefill(llama.document)
        gated.loss_and_gradient(llama.chunks[0], gated.gates())
    check()
    assert all(p.grad is None for p in model.parameters())
    with pytest.raises(KeyError), llama.gating(model=model):
        raise KeyError
    check()


def test_one_model_at_a_time(llama):
    with llama.gating():
        with pytest.raises(RuntimeError, match="already"), llama.gating():
            pass
        with pytest.raises(RuntimeError, match="already"), recording(llama.model, llama.geometry):
            pass
    with recording(llama.model, llama.geometry), pytest.raises(RuntimeError, match="already"), llama.gating():
        pass


def test_what_cannot_be_gated_is_refused(llama):
    with pytest.raises(ValueError, match="block_tokens=1"), llama.gating(TrimRule(16, 64, 16)):
        pass
    training = copy.deepcopy(llama.model).train()
    with pytest.raises(ValueError, match="eval mode"), llama.gating(model=training):
        pass
    shallow = Geometry(**{**llama.geometry.model_dump(), "layers": 2, "layer_types": ["full_attention"] * 2})
    with (
        pytest.raises(InputError, match="2 layers"),
        gating(llama.model, shallow, RULE, llama.frame, document_tokens=90),
    ):
        pass
    broken = copy.deepcopy(llama.model)
    broken.model.norm.weight.data.fill_(torch.nan)
    with llama.gating(model=broken) as gated:
        gated.prefill(llama.document)
        with pytest.raises(InputError, match="not a number"):
            gated.loss(llama.chunks[0], gated.gates())


def test_a_closed_gate_costs_no_full_attention_and_an_open_one_no_trimmed(llama, monkeypatch):
    seen = []
    blocked = kernels.blocked

    def watched(query, key, *others, **options):
        seen.append((options.get("window"), key.shape[1]))
        return blocked(query, key, *others, **options)

    monkeypatch.setattr(kernels, "blocked", watched)
    monkeypatch.setattr(kernels, "choose_fused", lambda *_: (None, "switched off"))
    with llama.gating() as gated:
        gated.prefill(llama.document)
        gates = gated.gates()
        seen.clear()
        gated.loss(llama.chunks[0], gates)
        assert all(window is None for window, _ in seen)
        gates[1] = torch.tensor([1.0, 0.0])
        gates[2] = 0.0
        seen.clear()
        gated.loss(llama.chunks[0], gates)
    full = [heads for window, heads in seen if window is None]
    assert full == [2, 2, 1, 1, 1, 2]  # context and repeat of layer 0, of one head of layer 1; sinks of layers 1 and 2
    assert [heads for window, heads in seen if window] == [1, 2]


def test_ablation_equals_naive_masks(llama):
    naive, open_gates = llama.naive(), torch.ones(3, 2)
    expected = torch.zeros(3, 2, dtype=torch.double)
    for chunk in llama.chunks:
        weight = (chunk.stop - chunk.start) / len(llama.document.context_ids)
        for layer in range(3):
            for head in range(2):
                gates = open_gates.clone()
                gates[layer, head] = 0.0
                expected[layer, head] += weight * (naive.loss(chunk, gates) - naive.loss(chunk, open_gates))
    with llama.gating() as gated:
        found = ablation_scores(gated, [llama.document])
    assert (found - expected).abs().max() < 1e-5
    assert expected.abs().max() > 1e-3


@pytest.mark.parametrize("steps", [1, 3])
def test_gate_scores_are_mean_slopes_over_the_path(llama, steps):
    naive, expected = llama.naive(), torch.zeros(3, 2, dtype=torch.double)
    for chunk in llama.chunks:
        weight = (chunk.stop - chunk.start) / len(llama.document.context_ids)
        for step in range(steps):
            expected -= weight / steps * naive.gradient(chunk, torch.full((3, 2), 1.0 - step / steps))
    with llama.gating() as gated:
        found = gate_scores(gated, [llama.document], steps)
    assert (found - expected).abs().max() < 1e-5


def test_greedy_trims_the_flattest_first_and_looks_again(llama):
    naive, gates, order = llama.naive(), torch.ones(3, 2), []
    while gates.any():
        slopes = torch.zeros(3, 2, dtype=torch.double)
        for chunk in llama.chunks:
            slopes -= naive.gradient(chunk, gates) * (chunk.stop - chunk.start)
        slopes[gates == 0] = torch.inf
        for head in slopes.flatten().argsort()[:2].tolist():
            order.append(head)
            gates.view(-1)[head] = 0.0
    with llama.gating() as gated:
        found = greedy(gated, [llama.document], share=0.34)
    assert found.flatten().argsort().tolist() == order
    assert found.flatten().sort().values.tolist() == pytest.approx([(i + 1) / 6 for i in range(6)])
