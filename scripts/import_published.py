"""Make the ready-made budget files in models/kv_budget from the head scores that KVzip and DuoAttention published.

    python scripts/import_published.py FOLDER

FOLDER holds ``kvzip_head_scores/*.pt`` and ``duo_attention/<model>/``, copied from the two repositories. A model that
both have scored gets KVzip's as its budget file and DuoAttention's in ``alternates/``, because the runtime wants
exactly one file for a model (docs/decisions/2026-11-23-ready-made-files.md).
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from kvprofile.budget import formats, known_models, store
from kvprofile.budget.formats.base import Origin, import_profile
from kvprofile.files import BUDGET_DIR

KVZIP = ("https://github.com/snu-mllab/KVzip", "5d8472975d286e3da6b52178af39d18904330c0d")
DUO = ("https://github.com/mit-han-lab/duo-attention", "fe93c314ae87306ef6629dc16713250b4718ffe7")
ALTERNATES = "alternates"


@dataclass(frozen=True)
class Published:
    """One model's scores: where they lie in FOLDER, what they are called in the repository, where the file goes."""

    model: str
    form: str
    local: tuple[str, ...]
    published: tuple[str, ...]
    alternate: bool = False


def kvzip(model: str, *names: str) -> Published:
    """Head scores of KVzip, one file for each document."""
    local = tuple(f"kvzip_head_scores/{name}.pt" for name in names)
    return Published(model, "kvzip", local, tuple(f"utils/head_score/{name}.pt" for name in names))


def duo(model: str, folder: str, run: str, *, alternate: bool = False) -> Published:
    """A DuoAttention pattern; ``run`` is the folder of the training run in the repository."""
    file = f"attn_patterns/{folder}/{run}/full_attention_heads.tsv"
    return Published(model, "duo-attention", (f"duo_attention/{folder}",), (file,), alternate)


SHORT, LONG = "lr=0.02-reg=0.05-ctx=1000_32000-multi_passkey10", "lr=0.02-reg=0.05-ctx=1000_128000-multi_passkey10"
LLAMA_31, GRADIENT = "meta-llama/Llama-3.1-8B-Instruct", "gradientai/Llama-3-8B-Instruct-Gradient"
FILES = (
    kvzip("Qwen/Qwen2.5-7B-Instruct-1M", "qwen2.5-7b-scbench_qa_eng-0", "qwen2.5-7b-scbench_repoqa-0"),
    kvzip("Qwen/Qwen2.5-14B-Instruct-1M", "qwen2.5-14b-scbench_qa_eng-0"),
    kvzip(LLAMA_31, "llama3.1-8b-scbench_qa_eng-0"),
    kvzip(f"{GRADIENT}-1048k", "duo-scbench_qa_eng-0"),
    duo(LLAMA_31, "Meta-Llama-3.1-8B-Instruct", LONG, alternate=True),
    duo(f"{GRADIENT}-1048k", "Llama-3-8B-Instruct-Gradient-1048k", SHORT, alternate=True),
    duo(f"{GRADIENT}-4194k", "Llama-3-8B-Instruct-Gradient-4194k", SHORT),
    duo("mistralai/Mistral-7B-Instruct-v0.2", "Mistral-7B-Instruct-v0.2", SHORT),
    duo("mistralai/Mistral-7B-Instruct-v0.3", "Mistral-7B-Instruct-v0.3", SHORT),
    duo("togethercomputer/Llama-2-7B-32K-Instruct", "Llama-2-7B-32K-Instruct", SHORT),
)


def target(entry: Published, folder: Path) -> Path:
    """Where the budget file goes."""
    name = store.file_name(entry.model)
    return folder / ALTERNATES / name.replace(".json", f".{entry.form}.json") if entry.alternate else folder / name


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the ready-made budget files from published head scores.")
    parser.add_argument("folder", type=Path, help="folder with kvzip_head_scores/ and duo_attention/")
    parser.add_argument("--output", type=Path, default=BUDGET_DIR, help="folder to write budget files to")
    options = parser.parse_args()
    for entry in FILES:
        repository, commit = KVZIP if entry.form == "kvzip" else DUO
        profile = import_profile(
            formats.get(entry.form),
            [options.folder / name for name in entry.local],
            known_models.find(entry.model),
            Origin(repository, commit, "MIT", entry.published),
        )
        path = target(entry, options.output)
        store.save(profile, path)
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
