"""The bundled checkpoint in stock vLLM on this machine's CPU: the same greedy tokens as Hugging Face."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kvprofile.questions.tasks import exercise
from kvprofile.scoring.prompts import chat_frame, encode
from tests.helpers.models import POCKET

pytestmark = pytest.mark.vllm

GENERATE = """
import json, sys
from vllm import LLM, SamplingParams
prompts = json.loads(sys.stdin.read())
llm = LLM(sys.argv[1], dtype="float32", max_model_len=1024, enforce_eager=True, block_size=32)
options = SamplingParams(temperature=0, max_tokens=12)
found = llm.generate([{"prompt_token_ids": ids} for ids in prompts], options)
print("TOKENS", json.dumps([list(f.outputs[0].token_ids) for f in found]))
"""


def questions(tokenizer, count):
    frame = chat_frame(tokenizer)
    for seed in range(count):
        made = exercise("needle", "vllm", seed, 700, 1)
        asked = "\n\n" + made.questions[0].text
        yield [*frame.prefix_ids, *encode(tokenizer, made.context), *encode(tokenizer, asked), *frame.suffix_ids]


def test_greedy_tokens_equal_transformers():
    pytest.importorskip("vllm")
    tokenizer = AutoTokenizer.from_pretrained(POCKET)
    model = AutoModelForCausalLM.from_pretrained(POCKET, dtype=torch.float32)
    prompts = list(questions(tokenizer, 8))
    expected = []
    for ids in prompts:
        found = model.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)
        expected.append(found[0, len(ids) :].tolist())
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
    environment |= {"OMP_NUM_THREADS": "2", "VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1"}
    run = subprocess.run(
        [sys.executable, "-c", GENERATE, str(POCKET)],
        input=json.dumps(prompts),
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    line = next(line for line in run.stdout.splitlines() if line.startswith("TOKENS"))
    assert json.loads(line.removeprefix("TOKENS")) == expected
