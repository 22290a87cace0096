"""Budget files that readers may disagree about."""

from __future__ import annotations

import pytest

from kvprofile.budget import store
from kvprofile.errors import InputError
from tests.helpers.factories import make_profile


def edited(change) -> bytes:
    """A good budget file's text after ``change``."""
    return change(store.to_bytes(make_profile(2, 2)).decode())


TEXTS = {
    "a key twice": (lambda text: text.replace('"seed": 0', '"seed": 0, "seed": 1').encode(), "'seed' is there twice"),
    "budgets twice": (lambda text: text[:-3].encode() + b', "budgets": {}}', "'budgets' is there twice"),
    "a long number": (lambda text: text.replace('"seed": 0', '"seed": ' + "9" * 5000).encode(), "of 5000 digits"),
    "a large number": (lambda text: text.replace('"seed": 0', '"seed": ' + "9" * 30).encode(), "of 30 digits"),
    "infinity": (lambda text: text.replace('"seed": 0', '"seed": 1e999').encode(), "1e999 is not allowed"),
    "NaN": (lambda text: text.replace('"seed": 0', '"seed": NaN').encode(), "NaN is not allowed"),
    "a mark of bytes": (lambda text: b"\xef\xbb\xbf" + text.encode(), "BOM"),
    "UTF-16": (lambda text: text.encode("utf-16"), "not UTF-8"),
    "nesting": (lambda _: b"[" * 10**6, "nested too deep"),
    "nesting of objects": (lambda _: b'{"a":' * 10**6, "nested too deep"),
    "a long version": (lambda text: text.replace('_version": 1', f'_version": "{"x" * 10**6}"').encode(), "version"),
    "a long name": (lambda text: text.replace('"statistic": "', '"statistic": "' + "x" * 10**6).encode(), "statistic"),
    "half a pair": (lambda text: text.replace('"seed": 0', '"seed": "\\ud800"').encode(), "seed"),
}


@pytest.mark.parametrize(("change", "message"), TEXTS.values(), ids=TEXTS)
def test_budget_files_that_readers_disagree_about_are_refused(change, message, tmp_path):
    file = tmp_path / "budget.json"
    file.write_bytes(edited(change))
    with pytest.raises(InputError) as error:
        store.load(file)
    assert message in str(error.value)
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 2500
