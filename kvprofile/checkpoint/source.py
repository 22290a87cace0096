"""Where a checkpoint is: a folder, or a hub id fetched in two steps, small files first."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from kvprofile.checkpoint.weights import weight_names
from kvprofile.errors import InputError, first_line, plain
from kvprofile.files import bundled_model

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SMALL_FILES = ("*.json", "*.jinja", "*.model", "*.txt")


@dataclass(frozen=True)
class Source:
    """Where a checkpoint lies, what it is called, its commit if it has one, and whether the hub may be asked for it.

    ``gguf`` is the name of a GGUF file in the folder, where the checkpoint is that file.
    """

    name: str
    folder: Path
    revision: str | None
    from_hub: bool = False
    gguf: str | None = None

    @property
    def path(self) -> Path:
        """The folder or, of a GGUF file, the file."""
        return self.folder / self.gguf if self.gguf else self.folder


def locate(model: str, revision: str | None = None, trust_remote_code: bool = False) -> Source:
    """Find a checkpoint folder or a GGUF file, or fetch the small files of a hub id.

    A folder never touches the network; nor does "pocket", the bundled checkpoint. Raises InputError where there is no
    such folder or repository.
    """
    try:
        folder = bundled_model(model) or Path(model).expanduser()
        is_folder, exists = folder.is_dir(), folder.exists()
    except (OSError, RuntimeError, ValueError) as error:
        raise InputError(f"cannot look for {model[:100]}: {first_line(error)}") from error
    if exists and revision is not None:
        raise InputError(f"{model} is a {'folder' if is_folder else 'file'} and has no revisions; leave out --revision")
    if is_folder:
        return _source_of_folder(folder)
    if exists and folder.suffix.lower() == ".gguf":
        return Source(plain(folder.name)[:200], folder.parent, None, gguf=folder.name)
    if exists:
        raise InputError(f"{model} is a file; give the checkpoint's folder, a .gguf file or a hub id")
    first = Path(model).parts[0] if Path(model).parts else ""
    looks_local = model.startswith((".", "/", "~")) or Path(first).is_dir()
    if looks_local or not _HUB_ID.fullmatch(model):
        raise InputError(f"no checkpoint folder {model}; give an existing folder or a hub id like Qwen/Qwen2.5-0.5B")
    folder = _download(model, revision, [*_SMALL_FILES, *(["*.py"] if trust_remote_code else [])])
    commit = folder.name if _COMMIT.fullmatch(folder.name) else None
    return Source(model, folder, commit, from_hub=True)


def fetch_weights(source: Source, trust_remote_code: bool) -> Path:
    """The folder with the source's weights; of a hub id those that its index names are fetched, and no others.

    A repository may hold the same weights again under other names (original/, consolidated.safetensors). Errors as in
    locate.
    """
    if not source.from_hub:
        return source.folder
    code = ["*.py"] if trust_remote_code else []
    weights = [_literal(name) for name in weight_names(source.folder)]
    return _download(source.name, source.revision, [*_SMALL_FILES, *weights, *code])


def _literal(name: str) -> str:
    """A pattern of the hub's client that matches this name and no other."""
    return re.sub(r"[*?\[]", r"[\g<0>]", name)


def _source_of_folder(folder: Path) -> Source:
    """Name a folder; inside the hub's cache layout the folder names tell hub id and commit."""
    resolved = folder.resolve()
    repository, is_snapshot = resolved.parent.parent.name, resolved.parent.name == "snapshots"
    if is_snapshot and repository.startswith("models--") and _COMMIT.fullmatch(resolved.name):
        return Source(repository.removeprefix("models--").replace("--", "/", 1), folder, resolved.name)
    return Source(plain(resolved.name)[:200] or "model", folder, None)


def _download(model: str, revision: str | None, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=patterns))
    except GatedRepoError as error:
        raise InputError(f"{model} is gated; accept its licence on the hub and run 'hf auth login'") from error
    except RevisionNotFoundError as error:
        raise InputError(f"{model} has no revision {revision!r}") from error
    except RepositoryNotFoundError as error:
        raise InputError(f"no model {model} on the hub and no such folder here") from error
    except HFValidationError as error:
        raise InputError(f"{model!r} is neither a folder nor a hub id: {first_line(error)}") from error
    except LocalEntryNotFoundError as error:
        raise InputError(
            f"{model} is not in the local hub cache and the hub cannot be reached; give a folder"
        ) from error
    except (HfHubHTTPError, OSError) as error:
        raise InputError(f"cannot fetch {model}: {first_line(error)}") from error
