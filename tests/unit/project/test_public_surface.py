"""Commands, options and documented imports are what they were, until somebody means to change them."""

from __future__ import annotations

from tests.helpers.public_surface import FILE, documented, found, surface


def test_nothing_public_changes_by_accident():
    """Where it is meant: run ``python -m tests.helpers.public_surface`` and tell it in CHANGELOG.md."""
    assert surface().splitlines() == FILE.read_text(encoding="utf-8").splitlines()


def test_what_the_docs_name_is_there():
    names = {*documented()}
    assert {"kvprofile.client.VLLMClient", "kvprofile.instrumentation.GPUMemoryManager"} <= names
    assert "kvprofile.evaluate.evaluation.evaluate_checkpoint" in names
    assert "kvprofile.report.html.write" in names
    assert all(found(name) is not None for name in names)
