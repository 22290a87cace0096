"""A hub on this machine: one repository, served as huggingface.co does, and a list of what was asked for."""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from tests.helpers.faulty import POLL_S

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextlib.contextmanager
def served(repository: str, folder: Path):
    """Serve a folder's files under a repository's name; gives the address and the set of files that were read."""
    files = {file.relative_to(folder).as_posix(): file for file in folder.rglob("*") if file.is_file()}
    read = set()

    class Handler(BaseHTTPRequestHandler):
        def _answer(self):
            path = self.path.partition("?")[0]
            if path.startswith(f"/api/models/{repository}/tree/"):
                tree = [
                    {"type": "file", "path": name, "size": file.stat().st_size, "oid": COMMIT}
                    for name, file in sorted(files.items())
                ]
                return 200, json.dumps(tree).encode(), {"Content-Type": "application/json"}
            if path.startswith(f"/api/models/{repository}"):
                siblings = [{"rfilename": name} for name in sorted(files)]
                content = json.dumps({"id": repository, "sha": COMMIT, "siblings": siblings}).encode()
                return 200, content, {"Content-Type": "application/json"}
            name = path.removeprefix(f"/{repository}/resolve/").partition("/")[2]
            if name not in files:
                return 404, b"", {"X-Error-Code": "EntryNotFound"}
            content = files[name].read_bytes()
            if self.command == "GET":
                read.add(name)
            return 200, content, {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": COMMIT}  # noqa: S324

        def do_GET(self):
            status, content, headers = self._answer()
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        do_HEAD = do_GET  # noqa: N815 - the name that http.server calls

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(POLL_S,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", read
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
