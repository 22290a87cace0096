"""Commands run in this process, in the current folder: what they print, or the line they refuse with."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvprofile.budget import store
from kvprofile.cli import run
from tests.helpers import foreign
from tests.helpers.factories import make_profile

CONFIG = {
    "model_type": "llama",
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
    "torch_dtype": "bfloat16",
}
"""The config.json of a small Llama."""


def save(file: str, **arguments: object) -> Path:
    """Write a made-up profile to a file."""
    path = Path(file)
    shape = (arguments.pop("layers", 6), arguments.pop("kv_heads", 4))
    store.save(make_profile(*shape, **arguments), path)
    return path


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line on stderr of a command that must end with exit code 2."""
    assert run(list(arguments)) == 2
    error = capsys.readouterr().err
    assert error.startswith("kvprofile: ")
    assert error.count("\n") == 1
    assert "Traceback" not in error
    return error


def shown(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What a command prints that must end well."""
    assert run(list(arguments)) == 0
    return capsys.readouterr().out


def save_without_scores(file: str, retention: float = 0.4) -> None:
    """A profile imported from a runtime file of make_profile() at a retention."""
    profile = make_profile()
    written = foreign.written(profile, "vllm", Path(), retention=retention)
    store.save(foreign.read_back(profile, "vllm", written), Path(file))


NO_SCORES = (
    "was imported from a runtime file, which holds no scores; only retention 0.4 is known, and only as it stands"
)
"""What commands say of such a profile where it is asked for more."""
