"""What a session sends between processes: vLLM's calls alone, because ranks may be on other machines."""

from __future__ import annotations

import ast

from tests.helpers.models import ROOT

OF_ONE_HOST = {"io", "mmap", "multiprocessing", "os", "pathlib", "shutil", "socket", "tempfile", "subprocess"}


def test_nothing_of_one_host_is_used():
    files = list((ROOT / "kvprofile" / "capture").glob("*.py"))
    assert len(files) > 8
    for file in files:
        tree = ast.parse(file.read_text(encoding="utf-8"))
        names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}
        assert not {name.partition(".")[0] for name in names} & OF_ONE_HOST, file.name
        called = {
            node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        }
        assert "open" not in called, file.name
