"""Servers that mean harm: what they send is bounded, breaks no benchmark, and they get nothing that is for others."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import openai
import pytest

from kvprofile.bench import chat_client
from kvprofile.bench.engines import openai_compatible
from kvprofile.bench.engines.base import LegFailedError
from kvprofile.bench.leg_store import LegStore
from kvprofile.bench.providers import Provider
from kvprofile.bench.runner import run
from kvprofile.bench.scenario import LoadPlan, remote_legs
from kvprofile.client import VLLMClient
from kvprofile.records import run_files
from tests.helpers.bench_plans import make_plan
from tests.helpers.faulty import POLL_S

pytestmark = pytest.mark.loopback

KEY = "sk-secret-of-mine"


@contextlib.contextmanager
def server(respond):
    """A server that answers every request by ``respond(handler)``. Gives its address and the requests it got."""
    got = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            length = int(self.headers.get("content-length") or 0)
            got.append(
                (self.path, {name.lower(): value for name, value in self.headers.items()}, self.rfile.read(length))
            )
            with contextlib.suppress(OSError):  # the client has left, as it should
                respond(self)

        def do_GET(self):
            self.do_POST()

        def log_message(self, *args):
            pass

    found = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    found.daemon_threads = True
    threading.Thread(target=found.serve_forever, args=(POLL_S,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{found.server_port}/v1", got
    finally:
        found.shutdown()
        found.server_close()


def send(handler, body, kind="application/json", status=200, **headers):
    handler.send_response(status)
    for name, value in {"Content-Type": kind, **headers}.items():
        handler.send_header(name, value)
    handler.end_headers()
    handler.wfile.write(body if isinstance(body, bytes) else json.dumps(body).encode())


def events(*pieces):
    return b"".join(b"data: " + json.dumps(piece).encode() + b"\n\n" for piece in pieces) + b"data: [DONE]\n\n"


def whole(text="fine", usage=None, reason="stop"):
    """An answer that is not streamed."""
    return {"id": "x", "choices": [{"index": 0, "message": {"content": text}, "finish_reason": reason}], "usage": usage}


def streamed(text="fine", usage=None, reason="stop"):
    return [
        {"id": "x", "choices": [{"index": 0, "delta": {"content": text}}]},
        {"id": "x", "choices": [{"index": 0, "delta": {}, "finish_reason": reason}]},
        {"id": "x", "choices": [], "usage": usage},
    ]


def ask(address, *, stream, **options):
    endpoint = chat_client.Endpoint(
        address, "m", KEY, **{"stream": stream, "timeout_s": 5.0, "max_attempts": 1, **options}
    )

    async def once():
        async with endpoint.client() as client:
            message = {"role": "user", "content": "?"}
            return await chat_client.ask(client, endpoint, [message], chat_client.Sampling(8), 0, "name")

    return asyncio.run(once())


@pytest.mark.parametrize("stream", [False, True])
def test_a_redirect_is_not_followed(stream):
    with (
        server(lambda handler: send(handler, whole())) as (elsewhere, got),
        server(lambda h: send(h, b"", status=307, Location=f"{elsewhere}/chat/completions")) as (address, _),
    ):
        answer = ask(address, stream=stream)
        provider = Provider(name="moved", base_url=address, key_env="MY_KEY")
        with pytest.raises(LegFailedError) as error, openai_compatible.connected(provider, None, {"MY_KEY": KEY}):
            pass
    assert answer.error.startswith("307: ")
    assert KEY not in f"{answer.error}{error.value}"
    assert got == []  # neither the key nor the prompt


def endless(handler, piece):
    send(handler, b"", "text/event-stream")
    while True:
        handler.wfile.write(piece)


@pytest.mark.parametrize(
    ("stream", "piece"),
    [
        (False, b"x" * 65536),
        (True, b"x" * 65536),  # a line that never ends
        (True, b": still there\n\n" * 4096),
        (True, events(streamed("x" * 65536)[0])[: -len(b"data: [DONE]\n\n")]),
    ],
    ids=["one body", "one line", "comments", "pieces"],
)
def test_an_answer_without_end_is_cut_off(monkeypatch, stream, piece):
    monkeypatch.setattr(chat_client, "MOST_BYTES", 2**22)
    with server(lambda handler: endless(handler, piece)) as (address, _):
        answer = ask(address, stream=stream)
    assert "an answer of more than " in answer.error


@pytest.mark.parametrize("stream", [False, True])
def test_a_text_that_models_do_not_write_is_refused(stream):
    text = "x" * (chat_client.MOST_CHARACTERS + 1)
    body = events(*streamed(text)) if stream else json.dumps(whole(text)).encode()
    with server(lambda handler: send(handler, body, "text/event-stream" if stream else "application/json")) as (to, _):
        assert "an answer of more than 1,048,576 characters" in ask(to, stream=stream).error


def test_an_answer_that_drips_is_cut_off(monkeypatch):
    monkeypatch.setattr(chat_client, "MOST_TIMEOUTS", 0.4)

    def drip(handler):
        send(handler, b"", "text/event-stream")
        while True:
            handler.wfile.write(b":")
            time.sleep(0.1)

    began = time.monotonic()
    with server(drip) as (address, _):
        answer = ask(address, stream=True)
    assert answer.error == "no answer within 2 s"
    assert time.monotonic() - began < 4


def test_an_answer_that_unpacks_to_more_is_refused():
    with server(lambda handler: send(handler, b"\x1f\x8b", **{"Content-Encoding": "gzip"})) as (address, got):
        assert "an answer that is packed" in ask(address, stream=False).error
    assert got[0][1]["accept-encoding"] == "identity"


def test_an_applications_client_does_not_follow_redirects_either():
    with (
        server(lambda handler: send(handler, whole())) as (elsewhere, got),
        server(lambda h: send(h, b"", status=307, Location=f"{elsewhere}/completions")) as (address, _),
        VLLMClient("m", url=address, api_key=KEY) as client,
        pytest.raises(openai.APIStatusError),
    ):
        client.generate_response("mine")
    assert [body for _, headers, body in got if body or "authorization" in headers] == []  # neither key nor prompt


STRANGE = [float("nan"), float("inf"), -1, 1e300, 10**30, "many", None, [], {}]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("value", STRANGE, ids=str)
def test_counts_that_are_not_counts_are_unknown(stream, value):
    usage = {"prompt_tokens": value, "completion_tokens": value, "prompt_tokens_details": {"cached_tokens": value}}
    body = events(*streamed(usage=usage)) if stream else json.dumps(whole(usage=usage)).encode()
    with server(lambda handler: send(handler, body, "text/event-stream" if stream else "application/json")) as (to, _):
        answer = ask(to, stream=stream)
    assert (answer.text, answer.error) == ("fine", None)
    assert (answer.input_tokens, answer.output_tokens, answer.cached_tokens) == (None, None, None)


NO_ANSWERS = [
    b"", b"null", b"[]", b"7", b'"text"', b"{}", b"\xff\xfe", b"[" * 100_000, b'{"choices": null}', b'{"choices": {}}',
    b'{"choices": [null]}', b'{"choices": ["x"]}', b'{"choices": [{"message": null, "delta": null}]}',
    b'{"choices": [{"message": {"content": ["x"]}, "delta": {"content": ["x"]}}]}',
    b'{"choices": [{"message": {"content": {"x": 1}}, "delta": {"content": {"x": 1}}}]}',
    b'{"choices": [{"message": {"content": 7}, "delta": {"content": 7}, "finish_reason": {"x": [1]}}], "usage": "x"}',
    b'{"error": {"message": {"x": 1}}}', b'{"error": "\\u001b[31mred"}',
]  # fmt: skip


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("body", NO_ANSWERS, ids=lambda body: body[:40].decode("ascii", "replace"))
def test_what_is_not_an_answer_is_an_error_in_one_line_or_an_empty_text(stream, body):
    sent = b"data: " + body + b"\n\n" if stream else body
    with server(lambda handler: send(handler, sent, "text/event-stream" if stream else "application/json")) as (to, _):
        answer = ask(to, stream=stream)
    assert answer.error or (answer.text == "" and not stream)
    assert (answer.error or "").isprintable()
    assert len(answer.error or "") < 1000


def test_a_benchmark_of_a_hostile_provider_ends_with_a_record_that_acts_on_nobody(workplace, capsys, monkeypatch):
    """Escapes, half surrogates, scripts, nesting and a name without end, in everything that a provider may send."""
    evil = "\x1b]0;owned\x07\x1b[2J</pre><script>alert(1)</script>\u202e\ud800" + "[" * 20_000
    monkeypatch.setenv("MY_KEY", KEY)
    usage = {"prompt_tokens": -5, "completion_tokens": float("nan")}

    def respond(handler):
        if handler.path.endswith("/models"):
            send(handler, {"object": "list", "data": [{"id": evil}]})
        else:
            send(handler, events(*streamed(f"{evil} {KEY}", usage, reason=evil)), "text/event-stream")

    with server(respond) as (address, _):
        provider = Provider(name="evil", base_url=address, key_env="MY_KEY", max_attempts=1)
        plan = make_plan(legs=remote_legs([provider]), load=LoadPlan(requests=3, warmup_requests=1), profile=None)
        found = run(plan, workplace / "run", print)
    (leg,) = found.legs
    assert (leg.status, leg.metrics.completed) == ("ok", 3)
    said = capsys.readouterr().out
    assert said.replace("\n", "").isprintable()
    again = run_files.load(workplace / "run" / "record.json")
    assert again == found
    assert KEY not in (workplace / "run" / "record.json").read_text()
    assert sorted(path.name for path in workplace.iterdir()) == ["run"]


def test_a_provider_that_serves_no_model_fails_its_own_leg(workplace):
    with server(lambda handler: send(handler, {"data": [{"id": 7}, {}, None]})) as (address, _):
        plan = make_plan(legs=remote_legs([Provider(name="odd", base_url=address)]), profile=None)
        found = run(plan, workplace / "run", print)
    assert found.legs[0].status == "failed"
    assert LegStore(workplace / "run", plan).finished(plan.legs[0], 0) is not None
