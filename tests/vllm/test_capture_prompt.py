"""Looking into one prompt on an application's own engine: summaries of its cache, its scores, and refusals."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from kvprofile.corpus.generate import generate_text
from kvprofile.scoring.prompts import FramedDocument, chat_frame, encode, frame_document
from tests.helpers.models import POCKET, ROOT
from tests.vllm.capture import TOLERANCE, hf_scores
from tests.vllm.engine import environment

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm

CHUNK = 60


def expected_summaries(model, ids):
    """From transformers' own cache, [L, G, ...]."""
    with torch.no_grad():
        layers = model(torch.tensor([ids]), use_cache=True).past_key_values.layers
    found = {}
    for kind in ("key", "value"):
        states = torch.stack([getattr(layer, f"{kind}s")[0] for layer in layers])  # [L, G, n, D]
        norms = states.norm(dim=-1)
        found |= {f"{kind}_mean": states.mean(2), f"{kind}_norm_mean": norms.mean(-1)}
        found |= {f"{kind}_norm_std": norms.std(-1, correction=0)}
        found |= {f"{kind}_norm_min": norms.amin(-1), f"{kind}_norm_max": norms.amax(-1)}
    return found


def test_a_prompt_is_looked_into(tmp_path, capsys):
    tokenizer = AutoTokenizer.from_pretrained(POCKET)
    model = AutoModelForCausalLM.from_pretrained(POCKET, dtype="float32").eval()
    frame = chat_frame(tokenizer)
    text = generate_text("prose", 11, 600)
    prompts = [
        list(encode(tokenizer, generate_text("prose", seed, 4000)))[:length] for seed, length in ((7, 250), (8, 90))
    ]
    job = {"prompts": prompts, "text": text, "chunk_tokens": CHUNK, "output": str(tmp_path / "found.safetensors")}
    job["engine"] = {
        "model": str(POCKET),
        "dtype": "float32",
        "max_model_len": 1024,
        "enforce_eager": True,
        "block_size": 32,
        "max_num_batched_tokens": 128,
    }
    run = subprocess.run(
        [sys.executable, "-m", "tests.vllm.prompt_driver"],
        input=json.dumps(job),
        env=environment(),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert run.returncode == 0, (run.stdout + run.stderr)[-4000:]
    line = next(line for line in run.stdout.splitlines() if line.startswith("RESULT"))
    notes, found = json.loads(line.removeprefix("RESULT")), load_file(tmp_path / "found.safetensors")

    documents = {
        "ids": FramedDocument("ids", tuple(prompts[0][:4]), tuple(prompts[0][4:])),
        "text": frame_document("text", encode(tokenizer, text), frame),
    }
    worst = 0.0
    for name, document in documents.items():
        ids = [*document.prefix_ids, *document.context_ids]
        assert notes[name] == [len(ids), len(document.prefix_ids), list(range(6))]
        for key, expected in expected_summaries(model, ids).items():
            torch.testing.assert_close(found[f"{name}.{key}"], expected, atol=TOLERANCE, rtol=1e-4)
            worst = max(worst, (found[f"{name}.{key}"] - expected).abs().max().item())
        (scores,) = hf_scores(model, POCKET, [document], CHUNK, frame)
        assert scores.std() > 1e-3
        torch.testing.assert_close(found[f"{name}.scores"], scores, atol=TOLERANCE, rtol=0)
    with capsys.disabled():
        print(f" worst difference of a summary {worst:.1e}", end="")
    assert notes["without scores"] is True
    assert notes["before"] == notes["after"]
    assert "max_model_len is 1024" in notes["too long"]
    assert notes["second session"].endswith("a session is open on this engine already")
    assert "another request ran in the same step" in notes["beside another"]
