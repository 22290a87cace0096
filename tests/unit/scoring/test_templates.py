"""Chat templates that always open something before an answer. The templates are our own and behave like those named."""

from __future__ import annotations

import copy

import pytest

from kvprofile.scoring.prompts import chat_frame

TURN = "<|user|>{{ m.content }}<|end|>"
USERS = "{% for m in messages %}{% if m.role == 'user' %}" + TURN
ASKING = "{% endif %}{% endfor %}{% if add_generation_prompt %}"

ALWAYS_THINKS = (
    USERS + "{% elif m.role == 'assistant' %}<|assistant|><think>\n{{ m.reasoning_content or '' }}\n</think>\n\n"
    "{{ m.content }}<|end|>" + ASKING + "<|assistant|><think>\n{% endif %}"
)
DROPS_THOUGHTS = (
    USERS + "{% elif m.role == 'assistant' %}<|assistant|>{{ m.content.split('</think>')[-1] }}<|end|>"
    + ASKING + "<|assistant|><think>\n{% endif %}"
)  # fmt: skip
THOUGHT_IF_ANY = (
    USERS + "{% elif m.role == 'assistant' %}<|assistant|>{% if m.reasoning_content %}<think>\n"
    "{{ m.reasoning_content }}\n</think>\n\n{% endif %}{{ m.content }}<|end|>"
    + ASKING + "<|assistant|><think>\n{% endif %}"
)  # fmt: skip
CHANNELS = (
    USERS + "{% elif m.role == 'assistant' %}{% if m.thinking %}<|start|>assistant<|channel|>analysis<|message|>"
    "{{ m.thinking }}<|end|>{% endif %}<|start|>assistant<|channel|>final<|message|>{{ m.content }}<|return|>"
    + ASKING + "<|start|>assistant{% endif %}"
)  # fmt: skip
EMPTY_THOUGHT = (
    USERS + "{% elif m.role == 'assistant' %}<|assistant|><think></think>{{ m.content }}<|end|>"
    + ASKING + "<|assistant|>{% endif %}"
)  # fmt: skip
CAN_BE_TOLD = (
    USERS + "{% elif m.role == 'assistant' %}<|assistant|>{{ m.content }}<|end|>"
    + ASKING + "<|assistant|>{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n"
    "{% endif %}{% endif %}"
)  # fmt: skip
PLAIN = (
    USERS + "{% elif m.role == 'assistant' %}<|assistant|> {{ m.content }}<|end|>" + ASKING + "<|assistant|>{% endif %}"
)

CLOSED = {
    "Qwen3-Thinking-2507": (ALWAYS_THINKS, "<|end|><|assistant|><think>\n\n</think>\n\n"),
    "DeepSeek-R1-Distill": (DROPS_THOUGHTS, "<|end|><|assistant|>"),
    "MiniMax-M2": (THOUGHT_IF_ANY, "<|end|><|assistant|><think>\n\n</think>\n\n"),
    "gpt-oss": (CHANNELS, "<|end|><|start|>assistant<|channel|>final<|message|>"),
    "Kimi-K2-Thinking": (EMPTY_THOUGHT, "<|end|><|assistant|><think></think>"),
    "Qwen3, told not to think": (CAN_BE_TOLD, "<|end|><|assistant|><think>\n\n</think>\n\n"),
    "without thoughts": (PLAIN, "<|end|><|assistant|>"),
}

FAILS = "{% elif m.role == 'assistant' %}{{ raise_exception('one turn only') }}"
SILENT = "{% elif m.role == 'assistant' %}(an answer)"
TWICE = "{% elif m.role == 'assistant' %}{{ m.content }}{{ m.content }}"


def frame_of(tokenizer, template):
    told = copy.deepcopy(tokenizer)
    told.chat_template = template
    return chat_frame(told)


@pytest.mark.parametrize(("template", "suffix"), CLOSED.values(), ids=CLOSED)
def test_what_is_opened_before_an_answer_is_closed(tokenizer, template, suffix):
    frame = frame_of(tokenizer, template)
    assert frame.suffix == suffix
    assert not frame.leaves_thought_open
    assert tokenizer.decode(frame.suffix_ids) == suffix


@pytest.mark.parametrize("opening", ["<think>\n", "[THINK]", "<seed:think>", "<|channel|>analysis<|message|>"])
@pytest.mark.parametrize("assistant", [FAILS, SILENT, TWICE], ids=["fails", "hides the answer", "repeats the answer"])
def test_a_thought_that_cannot_be_closed_is_said(tokenizer, assistant, opening):
    frame = frame_of(tokenizer, USERS + assistant + ASKING + "<|assistant|>" + opening + "{% endif %}")
    assert frame.suffix == "<|end|><|assistant|>" + opening
    assert frame.leaves_thought_open


@pytest.mark.parametrize("suffix", ["</think>", "<think></think>\n", "<|assistant|>", "<thing>", "think>", ""])
def test_closed_thoughts_and_other_tags_are_not_open(tokenizer, suffix):
    frame = frame_of(tokenizer, USERS + FAILS + ASKING + suffix + "{% endif %}")
    assert not frame.leaves_thought_open
