"""The one error that users see as a single line; ``kvprofile.cli`` turns it into exit code 2."""

from __future__ import annotations


class InputError(Exception):
    """A bad file, model, flag or environment: says what is wrong, where, and what to do, in one line."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))
