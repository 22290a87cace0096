"""The client where no engine is needed."""

from __future__ import annotations

import pytest

from kvprofile.client import VLLMClient
from kvprofile.errors import InputError


@pytest.mark.loopback
def test_a_server_is_not_looked_into():
    with VLLMClient("m", url="http://127.0.0.1:9") as client, pytest.raises(InputError, match="is a server"):
        client.capture_prompt("text")
