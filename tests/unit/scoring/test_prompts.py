"""The prompts of a reconstruction: chunks, what each repeats, and the frame that a chat template gives."""

from __future__ import annotations

from kvprofile.scoring.prompts import Frame, chat_frame, chunks, encode, frame_document, longest_repeat

FRAME = Frame("p", "s", (1, 2), (3,), (10, 11), (20, 21, 22))


def test_first_chunk_asks_for_all_and_later_ones_quote_eight_tokens():
    document = frame_document("d", range(100, 125), FRAME)
    found = list(chunks(document, FRAME, 10))
    assert [(c.start, c.stop) for c in found] == [(0, 10), (10, 20), (20, 25)]
    assert found[0].repeat_ids == (10, 11, 3, *range(100, 110))
    assert found[1].repeat_ids == (20, 21, 22, *range(102, 110), 3, *range(110, 120))
    assert found[2].repeat_ids == (20, 21, 22, *range(112, 120), 3, *range(120, 125))
    assert max(len(c.repeat_ids) for c in found) <= longest_repeat(FRAME, 10)


def test_without_a_prefix_the_first_tokens_serve():
    bare = Frame("", "\n", (), (3,), (10,), (20,))
    document = frame_document("d", range(10), bare)
    assert document.prefix_ids == (0, 1, 2, 3)
    assert document.context_ids == (4, 5, 6, 7, 8, 9)


def test_template_is_rendered_with_a_fixed_date_and_without_thinking(tokenizer):
    template = (
        "{{ strftime_now('%Y') }}|{{ date_string }}|{{ enable_thinking }}|{% for m in messages %}{{ m['content'] }}"
        "{% endfor %}{% if add_generation_prompt %}>>{% endif %}"
    )
    kept = tokenizer.chat_template
    tokenizer.chat_template = template
    try:
        frame = chat_frame(tokenizer)
    finally:
        tokenizer.chat_template = kept
    assert frame.prefix == "2025|01 Jan 2025|False|"
    assert frame.suffix == ">>"
    assert frame.prefix_ids == encode(tokenizer, frame.prefix)


def test_bos_is_the_prefix_where_there_is_no_template(tokenizer):
    kept = tokenizer.chat_template
    tokenizer.chat_template, tokenizer.bos_token = None, "<|user|>"
    try:
        frame = chat_frame(tokenizer)
    finally:
        tokenizer.chat_template, tokenizer.bos_token = kept, None
    assert frame.prefix_ids == (1,)
    assert frame.suffix == "\n"
