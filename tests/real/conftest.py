"""The pretrained model, loaded once. Where it is missing the tests fail: `make test-real` makes it first."""

from __future__ import annotations

import pytest

from kvprofile import checkpoint as checkpoints
from tests.helpers import real_model


@pytest.fixture(scope="session")
def folder():
    assert real_model.MISSING is None, real_model.MISSING
    return real_model.FOLDER


@pytest.fixture(scope="session")
def description(folder):
    return checkpoints.describe(checkpoints.locate(str(folder)))


@pytest.fixture(scope="session")
def smol_tokenizer(description):
    return checkpoints.load_tokenizer(description.source)


@pytest.fixture(scope="session")
def smol(description):
    return checkpoints.load_model(description, checkpoints.place(description, "float32", "cpu", 1000))
