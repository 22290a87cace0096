"""Foreign files for tests: written from a made-up profile, read back, refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvprofile.budget import formats
from kvprofile.budget.formats.base import Export, Origin, import_profile
from kvprofile.budget.known_models import ModelFacts
from kvprofile.budget.profile import Profile
from kvprofile.errors import InputError, plain

SUFFIX = {"kvzip": "x.pt", "duo-attention": "x", "lu-kv": "x.npy", "vllm": "x.json", "csv": "x.csv"}
SCORE_FORMATS = ["kvzip", "duo-attention", "csv"]


def facts_of(profile: Profile) -> ModelFacts:
    model = profile.model
    return ModelFacts(model.name, model.architecture, model.geometry, "a test")


def written(profile: Profile, name: str, folder: Path, **options: Any) -> Path:
    """A profile in a foreign form; ``options`` are those of Export."""
    path = folder / SUFFIX[name]
    formats.get(name).write(Export(profile, **options), path)
    return path


def read_back(profile: Profile, name: str, *paths: Path) -> Profile:
    """Files of the profile's model as a profile."""
    facts = None if formats.get(name).names_its_model else facts_of(profile)
    return import_profile(formats.get(name), paths, facts, Origin())


def content(path: Path) -> dict[str, bytes]:
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    return {file.name: file.read_bytes() for file in files}


def result_or_line(call: Callable[[], Any]) -> Any:
    """What a call returns or, where it refuses, the one line it says."""
    try:
        return call()
    except InputError as error:
        message = str(error)
    assert "\n" not in message
    return message


def refusal(name: str, profile: Profile, *paths: Path) -> str:
    """The message with which a file is refused: one line that names the file."""
    with pytest.raises(InputError) as caught:
        read_back(profile, name, *paths)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 600
    assert plain(paths[0]) in message
    return message
