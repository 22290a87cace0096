"""What README and docs show: their fenced blocks, the commands in them and the output beside each."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from kvprofile.budget import store

ROOT = Path(store.__file__).resolve().parents[2]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md")),
    *sorted(
        page
        for page in (ROOT / "docs").rglob("*.md")
        if "reference" not in page.parts
        and page.name not in ("static-budgets.md", "real-model.md", "graded-budgets.md")  # generated
    ),
]

_BLOCK = re.compile(
    r"(?:<!-- (?P<mark>[^>]*) -->\n)?^```(?P<language>\w*)\n(?P<body>.*?)^```$", re.DOTALL | re.MULTILINE
)
_ASSIGNMENT = re.compile(r"([A-Z_]+)=(.*)", re.DOTALL)


@dataclass(frozen=True)
class Block:
    """One fenced block. ``mark`` is the comment above it: 'slow', 'served', 'parsed: WHY' or nothing."""

    page: str
    line: int
    language: str
    mark: str
    body: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


@dataclass(frozen=True)
class Command:
    """One command, the environment in front of it, and the output that the page shows below it."""

    where: str
    words: tuple[str, ...]
    environment: dict[str, str]
    shown: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.where} {' '.join(self.words[:3])}"


def blocks(*languages: str) -> list[Block]:
    """Every fenced block in one of the languages, page by page."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for match in _BLOCK.finditer(text):
            if match["language"] in languages:
                line = text.count("\n", 0, match.start()) + 1
                name = page.relative_to(ROOT).as_posix()
                found.append(Block(name, line, match["language"], match["mark"] or "", match["body"]))
    return found


def commands(block: Block) -> list[Command]:
    """The commands of a console block. Lines that begin with '$ ' are commands, or all lines where none does."""
    body = block.body.replace("\\\n", "")
    session = any(line.startswith("$ ") for line in body.splitlines())
    found: list[tuple[str, list[str]]] = []
    for line in body.splitlines():
        if line.startswith("$ ") or (not session and line.strip() and not line.startswith("#")):
            found.append((line.removeprefix("$ "), []))
        elif session and found:
            found[-1][1].append(line)
    return [_command(str(block), line, shown) for line, shown in found]


def _command(where: str, line: str, shown: list[str]) -> Command:
    words = shlex.split(line, comments=True)
    environment = {}
    while words and (match := _ASSIGNMENT.fullmatch(words[0])):
        environment[match[1]] = match[2]
        words = words[1:]
    return Command(where, tuple(words), environment, tuple(shown))


def inline_code() -> list[tuple[str, str]]:
    """(page, code) of everything in single backticks outside of fenced blocks; decisions are of their day."""
    found = []
    for page in (each for each in PAGES if "decisions" not in each.parts):
        prose = _BLOCK.sub("", page.read_text(encoding="utf-8"))
        found += [(page.relative_to(ROOT).as_posix(), code) for code in re.findall(r"`([^`\n]+)`", prose)]
    return found


def shows(shown: tuple[str, ...], said: str) -> bool:
    """Whether what was said is what a page shows: a line '...' stands for any lines, seconds may differ.

    Lines of progress, which a slow machine says more of, are left out.
    """
    pattern = ""
    for line in "\n".join(shown).strip("\n").splitlines():
        if line == "...":
            pattern += r"(?:.*\n)*?"
        else:
            pieces = (re.escape(piece) for piece in re.sub(r"\bin \d+ s\b", "in N s", line.rstrip()).split("..."))
            pattern += ".*".join(pieces) + r"[ ]*\n"
    said = re.sub(r"^ +[\d,]+ of [\d,]+ tokens read.*\n", "", said.strip("\n") + "\n", flags=re.MULTILINE)
    said = re.sub(r"\bin \d+ s\b", "in N s", said)
    return re.fullmatch(pattern, said) is not None
