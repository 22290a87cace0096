"""Denies sockets to a test and to every Python process that it starts: Python imports this file from its path.

``TESTS_SOCKETS`` is "loopback" where a test may talk to this machine, and anything else where it may talk to nobody.
``TESTS_SOCKETS_DENIED`` is a file that gets a line for every attempt, because code may swallow the error. Audit hooks
see what goes through Python's socket module and can neither be removed nor patched away.
"""

import errno
import os
import sys

_ADDRESSED = {"socket.connect": 1, "socket.sendto": 1, "socket.sendmsg": 1, "socket.bind": 1, "socket.getnameinfo": 0}
_NAMED = {"socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr"}


def _deny(event, arguments):
    if event in _ADDRESSED:
        address = arguments[_ADDRESSED[event]]
        if not isinstance(address, tuple):  # a socket of the file system, or one that is connected already
            return
        host = address[0]
    elif event in _NAMED:
        host = arguments[0]
    else:
        return
    host = host.decode("ascii", "replace") if isinstance(host, bytes) else host
    if event == "socket.bind" and host == "::1":  # how urllib3 finds out, when it is imported, whether there is IPv6
        return
    if os.environ.get("TESTS_SOCKETS") == "loopback" and (event == "socket.bind" or _is_here(host)):
        return
    with open(os.environ.get("TESTS_SOCKETS_DENIED", os.devnull), "a") as told:
        told.write(f"{event} {host}\n")
    raise OSError(errno.ENETUNREACH, f"this test may not use the network: {event} {host}")


def _is_here(host):
    return host in (None, "", "localhost", "::1") or host.startswith(("127.", "0.0.0.0"))  # noqa: S104 - asked, not bound


sys.addaudithook(_deny)
