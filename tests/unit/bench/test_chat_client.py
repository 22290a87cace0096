"""Requests to a provider and what its answers ask for."""

from __future__ import annotations

import time

import pytest

from kvprofile.bench import chat_client


def test_requests_hold_what_the_provider_takes():
    point = chat_client.Endpoint("http://x/v1", "m", body={"top_k": 1}, omit=("seed", "max_tokens"))
    body = chat_client._body(point, [{"role": "user", "content": "?"}], chat_client.Sampling(9, ignore_eos=True), 3)
    assert "seed" not in body
    assert "max_tokens" not in body
    assert body["extra_body"] == {"top_k": 1, "ignore_eos": True}
    assert body["stream_options"] == {"include_usage": True}
    whole = chat_client._body(chat_client.Endpoint("http://x/v1", "m", stream=False), [], chat_client.Sampling(9), 3)
    assert (whole["seed"], whole["max_tokens"], whole["temperature"]) == (3, 9, 0.0)
    assert "stream" not in whole


def test_keys_are_never_part_of_a_repr():
    point = chat_client.Endpoint("http://x/v1", "m", "sk-secret")
    assert "sk-secret" not in repr(point)
    assert point.without_key("bad key sk-secret\nand more") == "bad key *** and more"


@pytest.mark.parametrize(("header", "seconds"), [("3", 3.0), ("0.5", 0.5), ("-4", 0.0), ("soon", None), ("", None)])
def test_retry_after_in_seconds(header, seconds):
    assert chat_client._retry_after(header) == seconds


def test_retry_after_as_a_date():
    from email.utils import formatdate

    assert chat_client._retry_after(formatdate(time.time() + 30, usegmt=True)) == pytest.approx(30, abs=2)
    assert chat_client._retry_after(formatdate(time.time() - 30, usegmt=True)) == 0
