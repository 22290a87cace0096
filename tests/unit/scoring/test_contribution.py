"""KVzip+ by its definition: whole attention matrices, and values multiplied out by the output projection."""

from __future__ import annotations

import copy

import pytest
import torch

from kvprofile.budget.profile import Geometry
from kvprofile.errors import InputError
from kvprofile.scoring.attention import recording
from kvprofile.scoring.contribution import watching
from kvprofile.scoring.prompts import chat_frame, chunks, frame_document
from kvprofile.scoring.reconstruction import Scorer
from tests.helpers.models import random_model

GEOMETRY = Geometry(layers=3, attention_heads=4, kv_heads=2, head_size=16, layer_types=["full_attention"] * 3)


def expected_scores(model, document, frame, chunk_tokens):
    """Token scores [L, G, T]: a x |W_O v| / |h|, each as x / (1 + x), one pass over everything for each chunk."""
    model = copy.deepcopy(model).double()
    length = len(document.prefix_ids) + len(document.context_ids)
    columns = []
    for chunk in chunks(document, frame, chunk_tokens):
        ids = torch.tensor([[*document.prefix_ids, *document.context_ids, *chunk.repeat_ids]])
        with torch.no_grad():
            found = model(ids, output_attentions=True, output_hidden_states=True, use_cache=False)
        prefix = len(document.prefix_ids)
        here = list(range(prefix + chunk.start, prefix + chunk.stop))
        scored = [*range(prefix), *here, *range(length, ids.shape[1])]
        layers = []
        for number, layer in enumerate(model.model.layers):
            rows = found.attentions[number][0][:, length:]
            share = rows[..., here] / rows[..., scored].sum(-1, keepdim=True)
            entering = found.hidden_states[number]
            values = layer.self_attn.v_proj(layer.input_layernorm(entering))[0, here].view(len(here), 2, 16)
            by_head = []
            for head in range(4):
                written = values[:, head // 2] @ layer.self_attn.o_proj.weight[:, 16 * head : 16 * head + 16].T
                given = entering[0, length:].norm(dim=-1)
                by_head.append((share[head] * written.norm(dim=-1) / given[:, None]).amax(0))
            layers.append(torch.stack(by_head).view(2, 2, -1).amax(1))
        columns.append(torch.stack(layers))
    products = torch.cat(columns, -1)
    return products / (1 + products)


@pytest.mark.parametrize("chunk_tokens", [100, 23])
def test_scores_equal_the_definition(tokenizer, chunk_tokens):
    model = random_model("llama")
    frame = chat_frame(tokenizer)
    document = frame_document("d", [5 + 7 * number % 200 for number in range(60)], frame)
    with (
        watching(model, GEOMETRY) as contributions,
        recording(model, GEOMETRY, contributions=contributions) as recorder,
    ):
        scorer = Scorer(model, recorder, frame, document_tokens=100, chunk_tokens=chunk_tokens)
        found = torch.cat([scored.token_scores for scored in scorer.score(document)], -1)
    torch.testing.assert_close(
        found.double(), expected_scores(model, document, frame, chunk_tokens), atol=1e-6, rtol=1e-4
    )
    assert not any(layer._forward_pre_hooks for layer in model.model.layers)


def test_a_model_without_output_projections_is_refused():
    model = random_model("llama")
    del model.model.layers[1].self_attn.o_proj
    with pytest.raises(InputError, match="layer 1 has none; use kvzip"), watching(model, GEOMETRY):
        pass
