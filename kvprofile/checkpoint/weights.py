"""Safetensors files read by their headers alone: are they whole, how large, and which weights are they."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import Path

from kvprofile.errors import InputError, first_line
from kvprofile.files import sha256_of

_SAMPLE_BYTES = 4096
_MAX_HEADER_BYTES = 100_000_000


@dataclass(frozen=True)
class Tensor:
    """One tensor in a file: its name, dtype and shape as a label, and its bytes [first, end)."""

    label: str
    first: int
    end: int


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that make up a checkpoint. Raises InputError where they are missing or pickled."""
    if not any(folder.glob("*.safetensors")):
        pickled = sorted([*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")])
        if pickled:
            raise InputError(f"{folder} has only {pickled[0].name}; kvprofile reads safetensors only, convert it first")
        raise InputError(f"{folder} has no *.safetensors; the download is incomplete or this is no checkpoint")
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        single = folder / "model.safetensors"
        return [single] if single.is_file() else sorted(folder.glob("*.safetensors"))
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise InputError(f"{index}: not a safetensors index: {first_line(error)}") from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise InputError(f"{index}: {name!r} is not a plain file name")
        if not (folder / name).is_file():
            raise InputError(f"{folder} lacks {name}, which its index names; the download is incomplete")
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
            Tensor(f"{name}|{info['dtype']}|{info['shape']}", *(data + int(at) for at in info["data_offsets"]))
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
