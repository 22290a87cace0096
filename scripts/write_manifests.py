"""Bring corpora/*/manifest.json up to date: `python scripts/write_manifests.py [--check]`.

Purpose, language and licence are written by hand and kept; hashes, sizes and token counts (tokenizer of
models/pocket) are computed. With --check nothing is written and a stale manifest ends with exit 1.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from kvprofile.corpus.sources import corpora_folder, load_corpus
from kvprofile.files import write_atomically
from kvprofile.scoring.prompts import encode

ROOT = Path(__file__).resolve().parents[1]
BY_HAND = ("purpose", "language", "licence", "origin")


def manifest(folder: Path, tokenizer: Any) -> dict[str, Any]:
    """The manifest a corpus folder should have."""
    file = folder / "manifest.json"
    known = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    documents = []
    for text in load_corpus(str(folder)).texts:
        raw = text.text.encode()
        documents.append(
            {
                "file": text.name,
                "sha256": hashlib.sha256(raw).hexdigest(),
                "bytes": len(raw),
                "tokens": len(encode(tokenizer, text.text)),
            }
        )
    return {
        "name": folder.name,
        **{key: known.get(key, "") for key in BY_HAND},
        "tokenizer": "models/pocket",
        "documents": documents,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Bring corpora/*/manifest.json up to date.")
    parser.add_argument("--check", action="store_true", help="only say which manifests are stale")
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "models" / "pocket")
    stale = []
    for folder in sorted(corpora_folder().glob("*/")):
        content = (json.dumps(manifest(folder, tokenizer), indent=2, ensure_ascii=False) + "\n").encode()
        file = folder / "manifest.json"
        if not file.is_file() or file.read_bytes() != content:
            stale.append(folder.name)
            if not arguments.check:
                write_atomically(file, content)
    print(f"stale: {', '.join(stale) or 'none'}")
    sys.exit(1 if stale and arguments.check else 0)


if __name__ == "__main__":
    main()
