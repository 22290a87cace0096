"""What `evaluate` measures on the pretrained model: the plain model, also in conversations and long texts."""

from __future__ import annotations

import math

import pytest
import torch

from kvprofile.budget.trim import TrimRule
from kvprofile.evaluate import encoding
from kvprofile.evaluate.measurer import Measurer
from kvprofile.evaluate.simulate import simulating
from kvprofile.questions.tasks import exercise

pytestmark = pytest.mark.real

RULE = TrimRule(16, 64)


@pytest.mark.parametrize("task", ["multi_turn", "continuation", "needle"])
def test_the_full_cache_is_the_plain_model(smol, smol_tokenizer, description, task):
    made = exercise(task, "test", 0, 400, 3, lambda text: len(encoding.encode(smol_tokenizer, text)))
    words = encoding.wording(smol_tokenizer, description.config, description.source.folder)
    asked = encoding.ask(task, made, 400, smol_tokenizer, words, RULE)
    geometry = description.geometry
    full, none = ([[value] * geometry.kv_heads] * geometry.layers for value in (1.0, 0.0))
    with simulating(smol, geometry, full, RULE) as simulation:
        measurer = Measurer(simulation, smol_tokenizer, words, 64, lambda _tokens: None, generate=False)
        with_all, with_none = measurer.measure(asked, [(full, None, "auto"), (none, None, "auto")])
    for row in asked.rows:
        with torch.inference_mode():
            plain = smol(torch.tensor([[*asked.context_ids, *row.ids]])).logits[0].log_softmax(-1)
        for reference in row.references:
            first = len(asked.context_ids) + reference.start - 1
            told = plain[first : first + len(reference.answer_ids)]
            nll = -told.gather(-1, torch.tensor(reference.answer_ids)[:, None]).mean().item()
            assert math.isclose(with_all[reference.question].nll, nll, abs_tol=1e-4)
    assert all(outcome.kl == 0 for outcome in with_all)
    assert all(outcome.kl > 0.01 for outcome in with_none)
    if task == "continuation":
        spans = with_none[0].spans
        assert [(span.first, span.last) for span in spans] == [(1, 64), (65, 150), (151, 500)]
        weights = [span.last - span.first + 1 for span in spans]
        mean = sum(span.kl * weight for span, weight in zip(spans, weights, strict=True)) / sum(weights)
        assert math.isclose(mean, with_none[0].kl, rel_tol=1e-6)
