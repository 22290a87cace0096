"""The one error that users see as a single line; ``kvprofile.cli`` turns it into exit code 2."""

from __future__ import annotations


class InputError(Exception):
    """A bad file, model, flag or environment: says what is wrong, where, and what to do, in one printable line."""

    def __init__(self, message: str) -> None:
        super().__init__(plain(message.strip()))


def plain(text: object) -> str:
    """Printable text: control characters and bytes that are no UTF-8, as file names may hold, are escaped."""
    return "".join(c if c.isprintable() else _escape(c) for c in str(text))


def _escape(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # how Python keeps a byte of a file name that is no UTF-8
        return f"\\x{code - 0xDC00:02x}"
    return character.encode("unicode_escape").decode("ascii")
