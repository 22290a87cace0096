"""A config that lies about the heads of its model."""

from __future__ import annotations

import pytest

from kvprofile.budget.profile import Geometry
from kvprofile.errors import InputError
from kvprofile.scoring.prompts import chat_frame, frame_document


def test_a_config_that_lies_about_its_heads_is_refused(tokenizer):
    from kvprofile.scoring.attention import recording
    from kvprofile.scoring.reconstruction import Scorer
    from tests.helpers.models import random_model

    geometry = Geometry(layers=3, attention_heads=4, kv_heads=4, head_size=16, layer_types=["full_attention"] * 3)
    frame = chat_frame(tokenizer)
    model = random_model("llama")
    with recording(model, geometry) as recorder:
        scorer = Scorer(model, recorder, frame, document_tokens=40, chunk_tokens=16)
        with pytest.raises(InputError, match="layer 0 has 4 query heads and 2 KV heads of size 16"):
            list(scorer.score(frame_document("d", range(5, 25), frame)))
