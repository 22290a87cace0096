"""A proxy in front of a real server that misbehaves on demand: statuses, slowness, broken connections."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections import deque
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

POLL_S = 0.01
"""How often a server of a test looks whether it is to stop: every 0.5 s by default, which each test would wait for."""

HOP_HEADERS = {"connection", "keep-alive", "transfer-encoding", "host", "content-length"}


class FaultyProxy:
    """Forwards everything; each POST takes the next fault, if one is left.

    Faults: an int is a status (with ``retry_after``, and the request's key quoted in the message); "slow" waits before
    it forwards; "cut" stops in the middle of the stream; "drop" closes without an answer; "garbage" sends a broken
    stream; None forwards.
    """

    def __init__(self, upstream: str, *, retry_after: str | None = None, slow_s: float = 3.0) -> None:
        self.upstream, self.retry_after, self.slow_s = urlsplit(upstream), retry_after, slow_s
        self.faults: deque = deque()
        self.always: object = None
        self.keys: list[str | None] = []
        self.posts = 0
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                proxy.forward(self, b"")

            def do_POST(self):
                body = self.rfile.read(int(self.headers.get("content-length", 0)))
                proxy.posts += 1
                proxy.keys.append(self.headers.get("authorization"))
                fault = proxy.faults.popleft() if proxy.faults else proxy.always
                proxy.misbehave(self, body, fault)

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, args=(POLL_S,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    def misbehave(self, handler, body, fault):
        if isinstance(fault, int):
            message = f"fault {fault}, your key was {handler.headers.get('authorization')}"
            self.answer(handler, fault, json.dumps({"error": {"message": message}}).encode())
        elif fault == "drop":
            handler.close_connection = True
            handler.connection.close()
        elif fault == "garbage":
            self.answer(handler, 200, b'data: {"id": "x", "choices": [{\n\n', "text/event-stream")
        else:
            if fault == "slow":
                time.sleep(self.slow_s)
            self.forward(handler, body, cut=fault == "cut")

    def answer(self, handler, status, body, kind="application/json"):
        handler.send_response(status)
        handler.send_header("content-type", kind)
        handler.send_header("content-length", str(len(body)))
        if self.retry_after is not None:
            handler.send_header("retry-after", self.retry_after)
        handler.end_headers()
        handler.wfile.write(body)

    def forward(self, handler, body, cut=False):
        upstream = http.client.HTTPConnection(self.upstream.hostname, self.upstream.port, timeout=300)
        headers = {name: value for name, value in handler.headers.items() if name.lower() not in HOP_HEADERS}
        upstream.request(handler.command, handler.path, body or None, headers)
        found = upstream.getresponse()
        handler.send_response(found.status)
        for name, value in found.getheaders():
            if name.lower() not in HOP_HEADERS:
                handler.send_header(name, value)
        handler.send_header("transfer-encoding", "chunked")
        handler.end_headers()
        pieces = 0
        while piece := found.read1(65536):
            handler.wfile.write(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
            handler.wfile.flush()
            pieces += 1
            if cut and pieces == 2:
                handler.close_connection = True
                handler.connection.close()
                upstream.close()
                return
        handler.wfile.write(b"0\r\n\r\n")
        upstream.close()
