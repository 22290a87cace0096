"""Files that people bring as text: UTF-8 with or without a byte order mark, JSON lines, and the text of PDF and docx.

PDF and docx need ``pip install 'kvprofile[documents]'``; other formats are named in the refusal.
"""

from __future__ import annotations

import io
import json
import logging
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from kvprofile.errors import InputError, first_line
from kvprofile.files import MAX_TEXT_BYTES, read_bytes

BYTE_ORDER_MARK = "\ufeff"

_STARTS = (
    (b"%PDF-", "a PDF"),
    (b"PK\x03\x04", "a zip archive"),
    (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an old Office file"),
    (b"{\\rtf", "RTF"),
    (b"\x1f\x8b", "gzip"),
    (b"\xff\xfe", "UTF-16"),
    (b"\xfe\xff", "UTF-16"),
)
_IN_ZIP = (
    ("word/document.xml", "a docx"),
    ("xl/workbook.xml", "an xlsx"),
    ("ppt/presentation.xml", "a pptx"),
    ("META-INF/container.xml", "an EPUB"),
    ("content.xml", "an OpenDocument file"),
)


def read_text(path: Path, most: int = MAX_TEXT_BYTES) -> str:
    """The text of a file of at most ``most`` bytes, without a byte order mark.

    Raises InputError where it cannot be read, is not text, or is a PDF or docx without text or without the extra.
    """
    content = read_bytes(path, most)
    kind = kind_of(content)
    if kind == "a PDF":
        return _checked(_pdf_text(content, path), path)
    if kind == "a docx":
        return _checked(_docx_text(content, path), path)
    if kind:
        raise InputError(f"{path} is {kind}, not UTF-8 text; convert it first")
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 (byte {error.start}); convert it first") from error
    if "\0" in text:
        raise InputError(f"{path} is not a text file")
    return text.removeprefix(BYTE_ORDER_MARK)


def kind_of(content: bytes) -> str | None:
    """What a file that is not plain text is, from its first bytes and, of an archive, from its members."""
    kind = next((name for start, name in _STARTS if content.startswith(start)), None)
    if kind != "a zip archive":
        return kind
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            members = set(archive.namelist())
    except (zipfile.BadZipFile, ValueError, OSError):
        return kind
    return next((name for member, name in _IN_ZIP if member in members), kind)


def json_lines(lines: Iterable[str], where: str) -> Iterator[tuple[int, Any]]:
    """(number, value) of each line that is not blank, byte order marks ignored. Raises InputError for what is not JSON.

    ``where`` names the file, and the number of the line follows it.
    """
    for number, line in enumerate(lines, 1):
        stripped = line.lstrip(BYTE_ORDER_MARK)
        if not stripped.strip():
            continue
        try:
            value = json.loads(stripped)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{where} line {number} is not JSON") from error
        yield number, value


def _pdf_text(content: bytes, path: Path) -> str:
    try:
        import pypdf
    except ImportError as error:
        raise _missing("a PDF", path) from error
    logging.getLogger("pypdf").setLevel(logging.CRITICAL)  # it warns about every irregular file
    try:
        return "\n\n".join(page.extract_text() for page in pypdf.PdfReader(io.BytesIO(content)).pages)
    except pypdf.errors.FileNotDecryptedError as error:
        raise InputError(f"{path} is a PDF with a password; save it without one") from error
    except Exception as error:  # pypdf raises many kinds for files that are not quite PDF
        raise InputError(f"{path} is a PDF that pypdf cannot read: {first_line(error)}") from error


def _docx_text(content: bytes, path: Path) -> str:
    """Paragraphs one a line and tables one row a line, in their order; headers, notes and comments are left out."""
    try:
        import docx
        from docx.table import Table
    except ImportError as error:
        raise _missing("a docx", path) from error
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        if sum(member.file_size for member in archive.infolist()) > MAX_TEXT_BYTES:
            raise InputError(f"{path} unpacks to more than {MAX_TEXT_BYTES // 2**20} MiB; no document is that large")
    try:
        lines = []
        for part in docx.Document(io.BytesIO(content)).iter_inner_content():
            if isinstance(part, Table):
                lines += ["\t".join(cell.text for cell in row.cells) for row in part.rows]
            else:
                lines.append(part.text)
    except Exception as error:  # python-docx and lxml raise many kinds for files that are not quite docx
        raise InputError(f"{path} is a docx that python-docx cannot read: {first_line(error)}") from error
    return "\n".join(lines)


def _missing(kind: str, path: Path) -> InputError:
    return InputError(f"{path} is {kind}; pip install 'kvprofile[documents]' to read its text, or convert it first")


def _checked(text: str, path: Path) -> str:
    """Extracted text without what no text holds. Raises InputError where nothing is left."""
    found = text.replace("\0", "").encode("utf-8", "replace").decode("utf-8")
    if not found.strip():
        raise InputError(f"{path} holds no text, only pictures perhaps; recognise its text (OCR) first")
    return found
