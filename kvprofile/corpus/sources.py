"""Where texts come from: bundled corpora, files, folders, JSON lines, data sets and generators.

Files are read verbatim, but for a byte order mark; JSON lines give a document a line. Every source gives whole
documents; cutting them to a number of tokens is done later, with the tokenizer at hand.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from kvprofile.corpus import datasets_
from kvprofile.corpus.generate import KINDS, generate_text
from kvprofile.corpus.text_files import json_lines, kind_of, read_text
from kvprofile.errors import InputError, plain
from kvprofile.files import MAX_TEXT_BYTES, sha256_of

GENERATED_CHARACTERS = 20_000
"""Length of a generated document unless the reference states one."""

_JSON_LINES = (".jsonl", ".ndjson")
_TEXT_COLUMNS = ("text", "content", "document", "context")


@dataclass(frozen=True)
class Text:
    """One document: where it came from and its text."""

    name: str
    text: str


@dataclass(frozen=True)
class Corpus:
    """Documents that belong together, as the budget file names them."""

    name: str
    texts: tuple[Text, ...]

    def sha256(self) -> str:
        """Hash over all names and texts, in order."""
        return sha256_of(*(part.encode() for text in self.texts for part in (text.name, text.text)))


def corpora_folder() -> Path:
    """The folder of bundled corpora: inside the package when installed, next to it in a checkout.

    Inside comes first: next to an installed package lie the packages of others.
    """
    inside = Path(str(files("kvprofile"))) / "data" / "corpora"
    return inside if inside.is_dir() else Path(__file__).resolve().parents[2] / "corpora"


def documents_folder() -> Path:
    """The folder of the bundled documents that are never scored on: texts to benchmark with and to continue."""
    inside = Path(str(files("kvprofile"))) / "data" / "documents"
    return inside if inside.is_dir() else Path(__file__).resolve().parents[2] / "benchmarks" / "documents"


def bundled_names() -> tuple[str, ...]:
    """Names of the bundled corpora, sorted."""
    return tuple(sorted(folder.name for folder in corpora_folder().glob("*/") if (folder / "manifest.json").is_file()))


def load_corpus(reference: str, limit: int | None = None) -> Corpus:
    """Read a corpus, of many documents only the first ``limit``.

    ``reference`` is one of

    - the name of a bundled corpus,
    - a file of text (``text_files`` says which formats), or a folder whose files are the documents,
    - a ``.jsonl`` file, or ``-`` for JSON lines on stdin, each a string or an object with a "text",
    - ``generate:KIND[:SEED[:CHARACTERS]]``,
    - ``datasets:ID_OR_PATH[:SPLIT[:CONFIG]][@COLUMN]`` (see ``kvprofile.corpus.datasets_``).

    Raises InputError where it is missing, unreadable, not UTF-8 or empty.
    """
    if reference == "-":
        return _checked("stdin", _from_stdin()[:limit])
    scheme, _, rest = reference.partition(":")
    if scheme == "generate":
        return _checked(reference, [_generated(reference, rest)])
    if scheme == "datasets":
        wanted = datasets_.parse(reference)
        return _checked(wanted.name, _from_datasets(reference, wanted, limit))
    if reference in bundled_names():
        return _checked(reference, _from_folder(corpora_folder() / reference)[:limit])
    try:
        path = Path(reference).expanduser()
        is_folder, is_file = path.is_dir(), path.is_file()
    except (OSError, RuntimeError, ValueError) as error:
        raise InputError(f"cannot look for corpus {reference[:100]!r}: {error}") from error
    if is_folder:
        return _checked(plain(path.resolve().name), _from_folder(path)[:limit])
    if is_file:
        return _checked(plain(path.name), _from_file(path, plain(path.name))[:limit])
    raise InputError(
        f"no corpus {reference!r}; give a file, a folder, '-', 'generate:KIND', 'datasets:ID' "
        f"or one of {', '.join(bundled_names())}"
    )


def _checked(name: str, texts: list[Text]) -> Corpus:
    for text in texts:
        if not text.text.strip():
            raise InputError(f"corpus {name}: {text.name} is empty")
    if not texts:
        raise InputError(f"corpus {name}: no documents")
    return Corpus(name, tuple(texts))


def _from_file(path: Path, name: str) -> list[Text]:
    """The documents of a file: one, but for JSON lines."""
    text = read_text(path)
    if path.suffix.lower() not in _JSON_LINES:
        return [Text(name, text)]
    return _from_lines(text, str(path))


def _from_folder(folder: Path) -> list[Text]:
    """Every file of a folder and its subfolders but manifests, READMEs and hidden files, sorted by path."""
    skipped = {"manifest.json", "readme.md"}
    found = sorted(
        file
        for file in _walk(folder)
        if file.is_file()
        and file.name.lower() not in skipped
        and not any(part.startswith(".") for part in file.relative_to(folder).parts)
    )
    if not found:
        raise InputError(f"corpus folder {folder} holds no files but READMEs and manifests")
    texts = []
    for file in found:
        name = plain(file.relative_to(folder).as_posix())
        documents = _from_file(file, name)
        lines = file.suffix.lower() in _JSON_LINES
        texts += [Text(f"{name}/{each.name}", each.text) for each in documents] if lines else documents
    return texts


def _walk(folder: Path) -> Iterator[Path]:
    """Every file below a folder. Raises InputError for a folder that cannot be read."""

    def unreadable(error: OSError) -> None:
        raise InputError(f"cannot read {error.filename}: {error.strerror}") from error

    for place, _, names in os.walk(folder, onerror=unreadable):
        yield from (Path(place) / name for name in names)


def _from_stdin() -> list[Text]:
    if sys.stdin is None:
        raise InputError("stdin is closed; pipe JSON lines into it")
    content = sys.stdin.buffer.read(MAX_TEXT_BYTES + 1)
    if len(content) > MAX_TEXT_BYTES:
        raise InputError(f"stdin holds more than {MAX_TEXT_BYTES // 2**20} MiB; no such corpus is that large")
    try:
        return _from_lines(content.decode("utf-8"), "stdin")
    except UnicodeDecodeError as error:
        kind = kind_of(content)
        told = f"is {kind}, not UTF-8 text" if kind else f"is not UTF-8 (byte {error.start})"
        raise InputError(f"stdin {told}") from error


def _from_lines(content: str, where: str) -> list[Text]:
    """The documents of JSON lines, each a string or an object with a "text" and perhaps a "name"."""
    texts = []
    for number, item in json_lines(content.split("\n"), where):
        text = item.get("text") if isinstance(item, dict) else item
        if not isinstance(text, str):
            raise InputError(f'{where} line {number} has no "text"; give one {{"text": "..."}} a line')
        if not _is_unicode(text):
            raise InputError(f"{where} line {number} holds half a surrogate pair, which is not text")
        name = item.get("name") if isinstance(item, dict) else None
        texts.append(Text(plain(name or f"line {number}"), text))
    return texts


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _generated(reference: str, rest: str) -> Text:
    kind, *numbers = rest.split(":")
    usage = f"{reference}: use generate:KIND[:SEED[:CHARACTERS]] with KIND one of {', '.join(KINDS)}"
    if kind not in KINDS or len(numbers) > 2:
        raise InputError(usage)
    try:
        seed, length = (int(n) for n in (*numbers, *("0", str(GENERATED_CHARACTERS))[len(numbers) :]))
        return Text(f"{kind}-{seed}", generate_text(kind, seed, length))
    except ValueError as error:
        raise InputError(usage) from error


def _from_datasets(reference: str, wanted: datasets_.DataSet, limit: int | None) -> list[Text]:
    table = datasets_.load(reference, wanted)
    column = wanted.column or next((name for name in _TEXT_COLUMNS if name in table.columns), "")
    if not column:
        raise InputError(f"{reference}: name the column of texts, @COLUMN, one of {', '.join(table.columns)}")
    if column not in table.columns:
        raise InputError(f"{reference}: no column {column!r}; it has {', '.join(table.columns)}")
    rows = table.rows.select(range(min(limit or table.rows.num_rows, table.rows.num_rows)))
    found = list(rows[column])
    strange = [index for index, text in enumerate(found) if not isinstance(text, str)]
    if strange:
        raise InputError(f"{reference}: row {strange[0]} of column {column!r} is not text; choose another @COLUMN")
    return [Text(f"{table.name}/{index}", text) for index, text in enumerate(found)]


def cut(
    corpus: Corpus, encode: Callable[[str], tuple[int, ...]], context_tokens: int | None
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(name, ids) of each document: whole, or its first ``context_tokens``; shorter documents are then left out.

    Raises InputError where none is long enough.
    """
    longest = 0
    for text in corpus.texts:
        ids = encode(text.text)
        longest = max(longest, len(ids))
        if context_tokens is None:
            yield text.name, ids
        elif len(ids) >= context_tokens:
            yield text.name, ids[:context_tokens]
    if longest < (context_tokens or 0):
        raise InputError(
            f"corpus {corpus.name} is too short: its longest document has {longest} tokens, "
            f"--context-tokens asks for {context_tokens}; lower it or choose another corpus"
        )
