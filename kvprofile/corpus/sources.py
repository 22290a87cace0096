"""Where texts come from: bundled corpora, files, folders, JSON lines on stdin, data sets and generators.

Files are read verbatim. Every source gives whole documents; cutting them to a number of tokens is done later, with
the tokenizer at hand.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from kvprofile.corpus.generate import KINDS, generate_text
from kvprofile.errors import InputError, first_line, plain
from kvprofile.files import MAX_TEXT_BYTES, read_bytes, sha256_of

GENERATED_CHARACTERS = 20_000
"""Length of a generated document unless the reference states one."""

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
    """The folder of bundled corpora: inside the package when installed, beside it in a checkout.

    Inside comes first: beside an installed package lie the packages of others.
    """
    inside = Path(str(files("kvprofile"))) / "data" / "corpora"
    return inside if inside.is_dir() else Path(__file__).resolve().parents[2] / "corpora"


def bundled_names() -> tuple[str, ...]:
    """Names of the bundled corpora, sorted."""
    return tuple(sorted(folder.name for folder in corpora_folder().glob("*/") if (folder / "manifest.json").is_file()))


def load_corpus(reference: str, limit: int | None = None) -> Corpus:
    """Read a corpus, of many documents only the first ``limit``.

    ``reference`` is one of

    - the name of a bundled corpus,
    - a text file, or a folder whose text files are the documents,
    - ``-``: JSON lines on stdin, each a string or an object with a "text",
    - ``generate:KIND[:SEED[:CHARACTERS]]``,
    - ``datasets:PATH_OR_ID[:SPLIT[:COLUMN]]``.

    Raises InputError where it is missing, unreadable, not UTF-8 or empty.
    """
    if reference == "-":
        return _checked("stdin", _from_stdin()[:limit])
    scheme, _, rest = reference.partition(":")
    if scheme == "generate":
        return _checked(reference, [_generated(reference, rest)])
    if scheme == "datasets":
        return _checked(_data_set_name(rest), _from_datasets(reference, rest, limit))
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
        return _checked(plain(path.name), [Text(plain(path.name), _read(path))])
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


def _read(path: Path) -> str:
    try:
        text = read_bytes(path, MAX_TEXT_BYTES).decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 (byte {error.start}); convert it first") from error
    if "\0" in text:
        raise InputError(f"{path} is not a text file")
    return text


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
    return [Text(plain(file.relative_to(folder).as_posix()), _read(file)) for file in found]


def _walk(folder: Path) -> Iterator[Path]:
    """Every file below a folder. Raises InputError for a folder that cannot be read."""

    def unreadable(error: OSError) -> None:
        raise InputError(f"cannot read {error.filename}: {error.strerror}") from error

    for place, _, names in os.walk(folder, onerror=unreadable):
        yield from (Path(place) / name for name in names)


def _from_stdin() -> list[Text]:
    texts = []
    try:
        if sys.stdin is None:
            raise InputError("stdin is closed; pipe JSON lines into it")
        content = sys.stdin.buffer.read(MAX_TEXT_BYTES + 1)
        if len(content) > MAX_TEXT_BYTES:
            raise InputError(f"stdin holds more than {MAX_TEXT_BYTES // 2**20} MiB; no such corpus is that large")
        lines = content.decode("utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise InputError(f"stdin is not UTF-8 (byte {error.start})") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            item = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f'stdin line {number} is not JSON; give one {{"text": "..."}} a line') from error
        text = item.get("text") if isinstance(item, dict) else item
        if not isinstance(text, str):
            raise InputError(f'stdin line {number} has no "text"; give one {{"text": "..."}} a line')
        if not _is_unicode(text):
            raise InputError(f"stdin line {number} holds half a surrogate pair, which is no text")
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


def _from_datasets(reference: str, rest: str, limit: int | None) -> list[Text]:
    import datasets

    path, *options = rest.split(":")
    split = options[0] if options and options[0] else "train"
    if not path or len(options) > 2:
        raise InputError(f"{reference}: use datasets:PATH_OR_ID[:SPLIT[:COLUMN]]")
    datasets.disable_progress_bars()
    try:
        table = _load_dataset(path, split)
        column = options[1] if len(options) > 1 else next((c for c in _TEXT_COLUMNS if c in table.column_names), "text")
        rows = table.select(range(min(limit or table.num_rows, table.num_rows)))
        found = list(rows[column]) if column in table.column_names else None
    except Exception as error:  # datasets and its readers raise all kinds
        raise InputError(f"{reference}: cannot load the data set: {first_line(error)}") from error
    if found is None:
        raise InputError(f"{reference}: no column {column!r}; it has {', '.join(table.column_names)}")
    strange = [index for index, text in enumerate(found) if not isinstance(text, str)]
    if strange:
        raise InputError(f"{reference}: row {strange[0]} of column {column!r} is no text; choose another column")
    return [Text(f"{split}/{index}", text) for index, text in enumerate(found)]


def _data_set_name(rest: str) -> str:
    """The reference without the folders of a local path: budget files name no machine's paths."""
    path, colon, options = rest.partition(":")
    return f"datasets:{Path(path).name if Path(path).exists() else path}{colon}{options}"


def _load_dataset(path: str, split: str):  # type: ignore[no-untyped-def]
    """A saved data set, a folder or file that datasets can read, or a data set of the hub."""
    import datasets

    place = Path(path)
    if place.is_dir() and (place / "dataset_info.json").is_file():
        return datasets.load_from_disk(path)
    if place.is_dir() and (place / "dataset_dict.json").is_file():
        return datasets.load_from_disk(path)[split]
    readers = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}
    if place.is_file() and place.suffix in readers:
        return datasets.load_dataset(readers[place.suffix], data_files=path, split=split)
    return datasets.load_dataset(path, split=split)


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
