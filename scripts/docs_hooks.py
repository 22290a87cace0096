"""MkDocs hooks: links that leave docs/ stay as repository browsers want them, and their targets join the site.

``[PATCHES.md](../kvprofile/runtime/PATCHES.md)`` becomes a page below ``files/``. What is linked and missing
is left as it is, so that the strict build fails on it.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

OUTSIDE = "files"
_LINK = re.compile(r"(\]\()([^)\s#]+)")


def on_files(files: Files, config: Any) -> Files:
    """Add what pages link to outside of docs/, and what those link to in turn."""
    root = Path(config.config_file_path).parent
    inside = Path(config.docs_dir).relative_to(root).as_posix()
    waiting = [f"{inside}/{file.src_uri}" for file in files.documentation_pages()]
    while waiting:
        page = waiting.pop()
        for _, link in _LINK.findall((root / page).read_text(encoding="utf-8")):
            target = _target(page, link)
            if _is_outside(target, inside) and (root / target).is_file():
                uri = f"{OUTSIDE}/{target}"
                if uri not in files.src_uris:
                    files.append(File.generated(config, uri, abs_src_path=str(root / target)))
                    waiting += [target] if target.endswith(".md") else []
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Point links that cross the border of docs/ to where their targets are in the site."""
    root = Path(config.config_file_path).parent
    inside = Path(config.docs_dir).relative_to(root).as_posix()
    own = page.file.src_uri
    place = own.removeprefix(f"{OUTSIDE}/") if own.startswith(f"{OUTSIDE}/") else f"{inside}/{own}"

    def moved(match: re.Match[str]) -> str:
        target = _target(place, match[2])
        uri = f"{OUTSIDE}/{target}" if _is_outside(target, inside) else target.removeprefix(f"{inside}/")
        if ":" in match[2] or uri not in files.src_uris:
            return match[0]
        return match[1] + posixpath.relpath(uri, posixpath.dirname(own) or ".")

    return _LINK.sub(moved, markdown)


def _target(page: str, link: str) -> str:
    return posixpath.normpath(posixpath.join(posixpath.dirname(page), link))


def _is_outside(target: str, inside: str) -> bool:
    return not target.startswith((f"{inside}/", ".."))
