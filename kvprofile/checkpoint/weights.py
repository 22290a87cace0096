"""Safetensors files read by their headers alone: are they whole, how large, and which weights are they."""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path

from kvprofile.errors import InputError, first_line
from kvprofile.files import sha256_of

_SAMPLE_BYTES = 4096
_MAX_HEADER_BYTES = 100_000_000
_SINGLE = "model.safetensors"


@dataclass(frozen=True)
class Tensor:
    """One tensor in a file: its name, dtype as the file names it, shape, and its bytes [first, end)."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    first: int
    end: int

    @property
    def label(self) -> str:
        """Name, dtype and shape, as fingerprints hold them."""
        return f"{self.name}|{self.dtype}|{list(self.shape)}"

    @property
    def count(self) -> int:
        """How many values it holds."""
        return math.prod(self.shape)


def weight_names(folder: Path) -> list[str]:
    """Names of the files that hold a checkpoint's weights, there or not yet: those in its index, else the single one.

    Raises InputError for an index that cannot be read.
    """
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return [_SINGLE]
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise InputError(f"{index}: not a safetensors index: {first_line(error)}") from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise InputError(f"{index}: {name!r} is not a plain file name")
    return names


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that make up a checkpoint. Raises InputError where they are missing or pickled."""
    found = sorted(folder.glob("*.safetensors"))
    if not found:
        pickled = sorted([*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")])
        if pickled:
            raise InputError(f"{folder} has only {pickled[0].name}; kvprofile reads safetensors only, convert it first")
        packed = sorted(folder.glob("*.gguf"))
        if packed:
            raise InputError(f"{folder} has no *.safetensors; to profile a GGUF file give the file itself: {packed[0]}")
        raise InputError(f"{folder} has no *.safetensors; the download is incomplete or this is not a checkpoint")
    names = weight_names(folder)
    for name in names:
        if not (folder / name).is_file():
            told = f"has {found[0].name} but no {_SINGLE} and no index; rename it, or write its index"
            indexed = f"lacks {name}, which its index names; the download is incomplete"
            raise InputError(f"{folder} {told if names == [_SINGLE] else indexed}")
    return [folder / name for name in names]


def read_header(file: Path) -> list[Tensor]:
    """The tensors of a file in file order. Raises InputError where the file does not match its header."""
    try:
        size = file.stat().st_size
        with open(file, "rb") as stream:
            lead = stream.read(8)
            length = struct.unpack("<Q", lead)[0] if len(lead) == 8 else _MAX_HEADER_BYTES + 1
            if length > min(size, _MAX_HEADER_BYTES):
                raise InputError(f"{file} is truncated or not a safetensors file; download it again")
            header = json.loads(stream.read(length))
        data = 8 + length
        tensors = [
            Tensor(
                name,
                str(info["dtype"]),
                tuple(map(int, info["shape"])),
                *(data + int(at) for at in info["data_offsets"]),
            )
            for name, info in header.items()
            if name != "__metadata__"
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise InputError(f"{file} is not a safetensors file: {first_line(error)}") from error
    tensors.sort(key=lambda tensor: (tensor.first, tensor.end))
    asked = tensors[-1].end if tensors else data
    if asked != size:
        raise InputError(f"{file} is truncated: its header asks for {asked} bytes, it has {size}; download it again")
    begins = [data, *(tensor.end for tensor in tensors)]
    if any(tensor.first != begin or tensor.end < begin for tensor, begin in zip(tensors, begins, strict=False)):
        raise InputError(f"{file} is not a safetensors file: its tensors overlap or leave gaps")
    return tensors


def fingerprint(headers: dict[Path, list[Tensor]]) -> str:
    """Hash over name, dtype, shape and sampled bytes of every tensor, whatever the sharding.

    Start, middle and end of each tensor are read: headers are the same for all fine-tunes of a model, bytes are not.
    """
    samples: dict[str, bytes] = {}
    for file, tensors in headers.items():
        with open(file, "rb") as stream:
            for tensor in tensors:
                last = max(tensor.first, tensor.end - _SAMPLE_BYTES)
                picked = b""
                for start in (tensor.first, (tensor.first + last) // 2, last):
                    stream.seek(start)
                    picked += stream.read(min(_SAMPLE_BYTES, tensor.end - start))
                samples[tensor.label] = picked
    return sha256_of(*(part for label in sorted(samples) for part in (label.encode(), samples[label])))
