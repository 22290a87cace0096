"""Sockets are really denied in tests, so that nothing that is tested uses the network unseen."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
import urllib.request

import pytest

ASKING = {
    "connect": lambda: socket.create_connection(("127.0.0.1", 9)),
    "connect to an address": lambda: socket.socket().connect(("192.0.2.1", 80)),
    "connect without an error": lambda: socket.socket().connect_ex(("192.0.2.1", 80)),
    "version 6": lambda: socket.socket(socket.AF_INET6).connect(("::1", 9)),
    "a datagram": lambda: socket.socket(type=socket.SOCK_DGRAM).sendto(b"x", ("192.0.2.1", 53)),
    "a name": lambda: socket.getaddrinfo("example.org", 80),
    "a name, the old way": lambda: socket.gethostbyname("example.org"),
    "listening": lambda: socket.socket().bind(("", 0)),
    "a page": lambda: urllib.request.urlopen("http://example.org"),
    "asyncio": lambda: asyncio.run(asyncio.open_connection("192.0.2.1", 80)),
}


@pytest.mark.parametrize("ask", ASKING.values(), ids=ASKING)
def test_sockets_are_denied_here(ask, sockets_denied):
    with pytest.raises(OSError, match="this test may not use the network"):
        ask()
    assert sockets_denied.read_text()
    sockets_denied.unlink()


def test_sockets_are_denied_to_processes_even_where_they_swallow_the_error(sockets_denied):
    code = "import contextlib, socket\nwith contextlib.suppress(OSError): socket.create_connection(('127.0.0.1', 9))"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert sockets_denied.read_text() == "socket.getaddrinfo 127.0.0.1\n"
    sockets_denied.unlink()


@pytest.mark.loopback
def test_a_mark_allows_this_machine_and_no_other(sockets_denied):
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()):
        pass
    with pytest.raises(OSError, match="may not use the network"):
        socket.socket().connect(("192.0.2.1", 80))
    sockets_denied.unlink()
