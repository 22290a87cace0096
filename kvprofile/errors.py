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
    """What a library says went wrong: its first line or, where that only begins a sentence, its first paragraph.

    Of more than 600 characters the beginning is kept, up to a word, and marked as cut.
    """
    paragraph = (str(error).strip() or type(error).__name__).partition("\n\n")[0].splitlines()
    begins = paragraph[0].rstrip().endswith((":", ",", "(", "["))
    told = " ".join(" ".join(paragraph if begins else paragraph[:1]).split())
    return told if len(told) <= 600 else f"{told[:600].rpartition(' ')[0] or told[:600]} …"


def _escape(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # how Python keeps a byte of a file name that is not UTF-8
        return f"\\x{code - 0xDC00:02x}"
    return character.encode("unicode_escape").decode("ascii")
