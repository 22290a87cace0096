"""Checkpoints: find one, say whether it can be profiled, fingerprint it and load it. Safetensors only.

Everything that can go wrong is found from the files' headers and the config, before any weights load.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvprofile.budget.profile import FULL_ATTENTION, SLIDING_ATTENTION, Geometry, ModelIdentity
from kvprofile.errors import InputError
from kvprofile.files import sha256_of

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SMALL_FILES = ["*.json", "*.jinja", "*.model", "*.txt"]
_SAMPLE_BYTES = 4096
_MAX_HEADER_BYTES = 100_000_000

_ENCODERS = ("bert", "electra", "data2vec", "xmod", "ernie")
_LATENT = ("kv_lora_rank",)
_OTHER_SENSES = ("vision_config", "audio_config", "encoder", "vision_encoder", "audio_encoder")


@dataclass(frozen=True)
class Source:
    """Where a checkpoint lies on this machine, what it is called, and its commit if it has one."""

    name: str
    folder: Path
    revision: str | None


@dataclass(frozen=True)
class Description:
    """What the config and the tensor headers of a checkpoint tell without loading weights."""

    source: Source
    config: PretrainedConfig
    geometry: Geometry
    architecture: str
    max_positions: int
    position_reason: str
    vocabulary_rows: int
    weight_bytes: int
    weights_sha256: str
    trust_remote_code: bool


@dataclass(frozen=True)
class Placement:
    """Where and how a model is loaded, each choice with its reason."""

    device: str
    dtype: str
    device_map: bool
    reasons: tuple[str, ...]


def locate(model: str, revision: str | None = None, trust_remote_code: bool = False) -> Source:
    """Find a checkpoint folder, or fetch the small files of a hub id.

    A folder never touches the network. Raises InputError where there is no such folder or repository.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        return _source_of_folder(folder)
    if folder.exists():
        raise InputError(f"{model} is a file; give the checkpoint's folder or a hub id")
    looks_local = model.startswith((".", "/", "~")) or Path(model).parts[:1] and Path(Path(model).parts[0]).is_dir()
    if looks_local or not _HUB_ID.fullmatch(model):
        raise InputError(f"no checkpoint folder {model}; give an existing folder or a hub id like Qwen/Qwen2.5-0.5B")
    folder = _download(model, revision, [*_SMALL_FILES, *(["*.py"] if trust_remote_code else [])])
    commit = folder.name if _COMMIT.fullmatch(folder.name) else None
    return Source(model, folder, commit)


def describe(source: Source, trust_remote_code: bool = False) -> Description:
    """Read config and tensor headers. Raises InputError for what cannot be profiled, by name."""
    config = _read_config(source, trust_remote_code)
    architecture = (getattr(config, "architectures", None) or [type(config).__name__.replace("Config", "ForCausalLM")])[0]
    _refuse_unsupported(source, config, architecture, trust_remote_code)
    geometry = _geometry(source, config)
    max_positions, reason = _max_positions(config)
    files = _weight_files(source)
    headers = {file: _read_header(file) for file in files}
    return Description(
        source=source,
        config=config,
        geometry=geometry,
        architecture=architecture,
        max_positions=max_positions,
        position_reason=reason,
        vocabulary_rows=int(config.vocab_size),
        weight_bytes=sum(end for header in headers.values() for _, _, _, end in header[-1:]),
        weights_sha256=_fingerprint(headers),
        trust_remote_code=trust_remote_code,
    )


def load_tokenizer(source: Source, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The checkpoint's tokenizer. Raises InputError where it is missing or broken."""
    from transformers import AutoTokenizer

    _quiet()
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            source.folder, trust_remote_code=trust_remote_code, local_files_only=True
        )
    except Exception as error:  # transformers and tokenizers raise whatever their parsers raise
        raise InputError(f"{source.folder}: cannot load the tokenizer: {_first_line(error)}") from error
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise InputError(f"{source.folder}: no tokenizer files; copy the model's tokenizer.json there")
    return tokenizer


def tokenizer_sha256(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash over the vocabulary sorted by id: equal for the same tokens, however the files are written."""
    entries = sorted((index, token) for token, index in tokenizer.get_vocab().items())
    return sha256_of(json.dumps(entries, ensure_ascii=True).encode())


def identity(description: Description, tokenizer: PreTrainedTokenizerBase) -> ModelIdentity:
    """The model part of a profile."""
    return ModelIdentity(
        name=description.source.name,
        revision=description.source.revision,
        architecture=description.architecture,
        geometry=description.geometry,
        geometry_sha256=description.geometry.sha256(),
        tokenizer_sha256=tokenizer_sha256(tokenizer),
        weights_sha256=description.weights_sha256,
    )


def place(description: Description, dtype: str, device: str, cache_tokens: int) -> Placement:
    """Choose device, dtype and device map. ``dtype`` and ``device`` may be 'auto'; anything else is obeyed.

    ``cache_tokens`` is the longest cache the run will hold. Raises InputError for an unknown dtype or device.
    """
    import psutil
    import torch

    free_cuda = []
    for index in range(torch.cuda.device_count()):
        free_cuda.append(torch.cuda.mem_get_info(index)[0])
    own_dtype = str(getattr(description.config, "dtype", None) or torch.float32).removeprefix("torch.")
    placement = choose_placement(
        dtype=dtype,
        device=device,
        own_dtype=own_dtype,
        parameters=_parameter_count(description, own_dtype),
        cache_values=cache_values(description.geometry, cache_tokens),
        free_cuda_bytes=free_cuda,
        free_host_bytes=psutil.virtual_memory().available,
    )
    try:
        torch.device(placement.device)
    except RuntimeError as error:
        raise InputError(f"unknown device {device!r}; use auto, cpu, cuda or cuda:N") from error
    if placement.device.startswith("cuda") and not free_cuda:
        raise InputError(f"device {device!r} asked for, but torch sees no CUDA device; use --device cpu")
    return placement


def choose_placement(
    *,
    dtype: str,
    device: str,
    own_dtype: str,
    parameters: int,
    cache_values: int,
    free_cuda_bytes: Sequence[int],
    free_host_bytes: int,
) -> Placement:
    """The choice of ``place`` as a pure function of sizes: parameters and cache in values, memory in bytes."""
    if dtype not in ("auto", *DTYPES):
        raise InputError(f"unknown dtype {dtype!r}; use one of auto, {', '.join(DTYPES)}")
    reasons = []
    if device == "auto":
        device = "cuda" if free_cuda_bytes else "cpu"
        reasons.append(f"device {device}: " + ("torch sees a GPU" if free_cuda_bytes else "torch sees no GPU"))
    else:
        reasons.append(f"device {device}: asked for")
    if dtype != "auto":
        reasons.append(f"dtype {dtype}: asked for")
    elif device.startswith("cuda"):
        dtype = own_dtype if own_dtype in DTYPES else "bfloat16"
        reasons.append(f"dtype {dtype}: the checkpoint's own, on a GPU")
    elif (parameters + cache_values) * 4 * 1.2 < free_host_bytes:
        dtype = "float32"
        reasons.append("dtype float32: exact, and weights and cache fit into memory")
    else:
        dtype = own_dtype if own_dtype in DTYPES else "bfloat16"
        reasons.append(f"dtype {dtype}: float32 weights would not fit into memory")
    needed = (parameters + cache_values) * DTYPES[dtype]
    device_map = False
    if device == "cuda":
        largest = max(free_cuda_bytes, default=0)
        device_map = needed * 1.1 > largest
        if device_map:
            where = "GPUs" if len(free_cuda_bytes) > 1 and needed * 1.1 < sum(free_cuda_bytes) else "GPU and CPU memory"
            reasons.append(
                f"device map over {where}: weights and cache need {_gib(needed)}, the largest GPU has {_gib(largest)}"
            )
    return Placement(device, dtype, device_map, tuple(reasons))


DTYPES = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Bytes of a value for each dtype a model can be loaded in."""


def cache_values(geometry: Geometry, tokens: int) -> int:
    """Values in a cache of that many tokens: keys and values of every layer and KV head."""
    return 2 * geometry.layers * geometry.kv_heads * geometry.head_size * tokens


def load_model(description: Description, placement: Placement) -> PreTrainedModel:
    """Load the weights, for inference. Raises InputError where files are missing, broken or do not fit."""
    import torch
    from transformers import AutoModelForCausalLM

    _quiet()
    source = _with_weights(description)
    options: dict[str, Any] = {"device_map": "auto"} if placement.device_map else {}
    try:
        model = AutoModelForCausalLM.from_pretrained(
            source.folder,
            config=description.config,
            dtype=getattr(torch, placement.dtype),
            use_safetensors=True,
            trust_remote_code=description.trust_remote_code,
            local_files_only=True,
            **options,
        )
        if not placement.device_map:
            model.to(placement.device)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise InputError(f"{source.folder}: cannot load the weights: {_first_line(error)}") from error
    model.requires_grad_(False)
    return model.eval()


def _source_of_folder(folder: Path) -> Source:
    """Name a folder; inside the hub's cache layout the folder names tell hub id and commit."""
    resolved = folder.resolve()
    repository, is_snapshot = resolved.parent.parent.name, resolved.parent.name == "snapshots"
    if is_snapshot and repository.startswith("models--") and _COMMIT.fullmatch(resolved.name):
        return Source(repository.removeprefix("models--").replace("--", "/", 1), folder, resolved.name)
    return Source(resolved.name, folder, None)


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
        raise InputError(f"{model!r} is neither a folder nor a hub id: {_first_line(error)}") from error
    except LocalEntryNotFoundError as error:
        raise InputError(f"{model} is not in the local hub cache and the hub cannot be reached; give a folder") from error
    except (HfHubHTTPError, OSError) as error:
        raise InputError(f"cannot fetch {model}: {_first_line(error)}") from error


def _with_weights(description: Description) -> Source:
    source = description.source
    return source if _is_complete(source.folder) else _fetch_weights(source, description.trust_remote_code)


def _fetch_weights(source: Source, trust_remote_code: bool) -> Source:
    patterns = [*_SMALL_FILES, "*.safetensors", *(["*.py"] if trust_remote_code else [])]
    return Source(source.name, _download(source.name, source.revision, patterns), source.revision)


def _is_complete(folder: Path) -> bool:
    return any(folder.glob("*.safetensors"))


def _read_config(source: Source, trust_remote_code: bool) -> PretrainedConfig:
    from transformers import AutoConfig
    from transformers import __version__ as transformers_version

    _quiet()
    file = source.folder / "config.json"
    if not file.is_file():
        raise InputError(f"{source.folder} has no config.json; give the folder of a Hugging Face checkpoint")
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
        model_type = raw["model_type"]
    except (OSError, ValueError) as error:
        raise InputError(f"{file}: not readable as JSON: {_first_line(error)}") from error
    except (KeyError, TypeError) as error:
        raise InputError(f"{file}: no model_type; not the config of a Hugging Face checkpoint") from error
    if "auto_map" in raw and not trust_remote_code:
        raise InputError(f"{source.name} brings its own code; read it, then pass --trust-remote-code to run it")
    try:
        return AutoConfig.from_pretrained(source.folder, trust_remote_code=trust_remote_code, local_files_only=True)
    except Exception as error:  # configs validate themselves and raise all kinds
        if "does not recognize this architecture" in str(error):
            raise InputError(f"{source.name}: model type {model_type!r} is not known to transformers {transformers_version}") from error
        raise InputError(f"{file}: {_first_line(error)}") from error


def _refuse_unsupported(source: Source, config: PretrainedConfig, architecture: str, trust_remote_code: bool) -> None:
    kind = config.model_type

    def refuse(why: str) -> InputError:
        return InputError(f"{source.name} ({architecture}, model type {kind!r}) cannot be profiled: {why}")

    if getattr(config, "is_encoder_decoder", False):
        raise refuse("it is an encoder-decoder; only decoders keep one cache per request")
    if any(getattr(config, name, None) is not None for name in _OTHER_SENSES):
        raise refuse("it reads images or sound; give the checkpoint of its language model")
    if any(getattr(config, name, None) for name in _LATENT):
        raise refuse("multi-head latent attention has no per-head cache")
    if getattr(config, "num_kv_shared_layers", 0):
        raise refuse("its layers share their caches")
    if kind.startswith(_ENCODERS) or "bert" in kind:
        raise refuse("it is an encoder")
    types = {*(getattr(config, "layer_types", None) or ()), *(getattr(config, "layers_block_type", None) or ())}
    foreign = sorted(types - {FULL_ATTENTION, SLIDING_ATTENTION, "attention"})
    if foreign:
        raise refuse(f"it has layers of type {', '.join(foreign)}")
    if trust_remote_code and getattr(config, "auto_map", None):
        return
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise refuse("transformers has no causal language model for it")
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    if not getattr(model_class, "_supports_attention_backend", False):
        raise refuse("its attention does not go through transformers' attention interface")


def _geometry(source: Source, config: PretrainedConfig) -> Geometry:
    layers, heads = config.num_hidden_layers, config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    types = getattr(config, "layer_types", None) or [SLIDING_ATTENTION if window else FULL_ATTENTION] * layers
    if FULL_ATTENTION not in types:
        raise InputError(
            f"{source.name} cannot be profiled: every layer slides over a window of {window} tokens, so no head keeps the context"
        )
    try:
        return Geometry(
            layers=layers, attention_heads=heads, kv_heads=kv_heads, head_size=head_size, layer_types=list(types)
        )
    except (ValueError, TypeError) as error:
        raise InputError(f"{source.folder / 'config.json'}: {_first_line(error)}") from error


def _max_positions(config: PretrainedConfig) -> tuple[int, str]:
    """The longest sequence whose cached keys stay valid, and why.

    Dynamic-NTK and longrope change every rotary frequency once a sequence is longer than the original length, which
    would leave keys cached before out of date.
    """
    limit = int(getattr(config, "max_position_embeddings", 0) or 0) or 2**31
    reason = f"max_position_embeddings is {limit}"
    rope = getattr(config, "rope_parameters", None) or {}
    for parameters in [rope, *(value for value in rope.values() if isinstance(value, dict))]:
        kind = parameters.get("rope_type")
        if kind in ("dynamic", "longrope"):
            original = parameters.get("original_max_position_embeddings") or getattr(
                config, "original_max_position_embeddings", None
            )
            if original and original < limit:
                limit, reason = int(original), f"{kind} RoPE changes its factors beyond {original} positions"
    return limit, reason


def _weight_files(source: Source) -> list[Path]:
    """The safetensors files that make up the checkpoint; fetched first where the source is a hub snapshot."""
    folder = source.folder
    if not _is_complete(folder):
        if source.revision and folder.name == source.revision:
            folder = _fetch_weights(source, False).folder
        if not _is_complete(folder):
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
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise InputError(f"{index}: not a safetensors index: {_first_line(error)}") from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise InputError(f"{index}: {name!r} is not a plain file name")
        if not (folder / name).is_file():
            raise InputError(f"{folder} lacks {name}, which its index names; the download is incomplete")
    return [folder / name for name in names]


def _read_header(file: Path) -> list[tuple[str, str, int, int]]:
    """(tensor name with dtype and shape, name, first byte, end byte in the file), in file order.

    Raises InputError where the file is shorter or longer than its header says.
    """
    try:
        size = file.stat().st_size
        with open(file, "rb") as stream:
            lead = stream.read(8)
            length = struct.unpack("<Q", lead)[0] if len(lead) == 8 else _MAX_HEADER_BYTES + 1
            if length > min(size, _MAX_HEADER_BYTES):
                raise InputError(f"{file} is truncated or not a safetensors file; download it again")
            header = json.loads(stream.read(length))
        entries = [
            (f"{name}|{info['dtype']}|{info['shape']}", name, 8 + length + info["data_offsets"][0], 8 + length + info["data_offsets"][1])
            for name, info in header.items()
            if name != "__metadata__"
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise InputError(f"{file} is not a safetensors file: {_first_line(error)}") from error
    entries.sort(key=lambda entry: entry[2:])
    if not entries or entries[-1][3] != size or any(first > end or first < 8 + length for _, _, first, end in entries):
        raise InputError(f"{file} is truncated: its header asks for {entries[-1][3] if entries else 0} bytes, it has {size}")
    return entries


def _fingerprint(headers: dict[Path, list[tuple[str, str, int, int]]]) -> str:
    """Hash over name, dtype, shape and sampled bytes of every tensor, whatever the sharding.

    Start, middle and end of each tensor are read: headers are the same for all fine-tunes of a model, bytes are not.
    """
    samples: dict[str, bytes] = {}
    for file, entries in headers.items():
        with open(file, "rb") as stream:
            for label, _, first, end in entries:
                middle = max(first, (first + end - _SAMPLE_BYTES) // 2)
                picked = []
                for start in (first, middle, max(first, end - _SAMPLE_BYTES)):
                    stream.seek(start)
                    picked.append(stream.read(min(_SAMPLE_BYTES, end - start)))
                samples[label] = b"".join(picked)
    return sha256_of(*(part for label in sorted(samples) for part in (label.encode(), samples[label])))


def _parameter_count(description: Description, own_dtype: str) -> int:
    return math.ceil(description.weight_bytes / DTYPES.get(own_dtype, 2))


def _quiet() -> None:
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _gib(count: float) -> str:
    return f"{count / 2**30:.1f} GiB"


def _first_line(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:300]
