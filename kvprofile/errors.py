"""The one error that users see as a line, which ``kvprofile.cli`` turns into exit code 2, and texts fit for it."""

from __future__ import annotations

MOST_CHARACTERS = 2000


class InputError(Exception):
    """A bad file, model, flag or environment: says what is wrong, where, and what to do, in one printable line.

    Of very long lines, which files and servers can cause, the beginning and the end are kept.
    """

    def __init__(self, message: str) -> None:
        line = plain(message.strip())
        super().__init__(line if len(line) <= MOST_CHARACTERS else f"{line[:1500]} … {line[-400:]}")


def plain(text: object) -> str:
    """Printable text: control characters and bytes that are not UTF-8, as file names may hold, are escaped."""
    return "".join(c if c.isprintable() else _escape(c) for c in str(text))


def first_line(error: Exception) -> str:
    """What a library says went wrong, short enough for one line."""
    lines = (str(error).strip() or type(error).__name__).splitlines()
    told = lines[0] if not lines[0].endswith(":") else " ".join(line.strip() for line in lines[:3])
    return told[:300]


def _escape(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # how Python keeps a byte of a file name that is not UTF-8
        return f"\\x{code - 0xDC00:02x}"
    return character.encode("unicode_escape").decode("ascii")
