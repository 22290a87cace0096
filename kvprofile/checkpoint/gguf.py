"""GGUF files, as llama.cpp writes them: one file with config, tokenizer and weights, most of them quantised.

transformers multiplies the weights out when it loads them. It skips what it does not know, so everything in a file is
compared here with the model that comes of it. Names and meanings: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import importlib.util
import math
import tempfile
from collections import Counter
from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvprofile.checkpoint.weights import Tensor
from kvprofile.errors import InputError, first_line, plain

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

ARCHITECTURES = ("llama", "qwen2", "qwen3", "qwen3moe")
"""Those whose files state everything that scores depend on; those of Gemma 2 and 3 lack the scale of logits."""

_ROPE_FACTORS = "rope_freqs.weight"

_SAME_AS = {
    "block_count": ("num_hidden_layers",),
    "context_length": ("max_position_embeddings",),
    "embedding_length": ("hidden_size",),
    "feed_forward_length": ("intermediate_size",),
    "vocab_size": ("vocab_size",),
    "attention.head_count": ("num_attention_heads",),
    "attention.head_count_kv": ("num_key_value_heads",),
    "attention.key_length": ("head_dim",),
    "attention.value_length": ("head_dim",),
    "attention.layer_norm_rms_epsilon": ("rms_norm_eps",),
    "rope.dimension_count": ("head_dim",),
    "rope.freq_base": ("rope_theta",),
    "attention.sliding_window": ("sliding_window",),
    "expert_count": ("num_experts",),
    "expert_used_count": ("num_experts_per_tok",),
    "expert_feed_forward_length": ("moe_intermediate_size",),
}
"""Keys of a file, without the architecture in front, and what the config must have read from them."""

_WITHOUT_EFFECT = {"rope.scaling.finetuned", "rope.scaling.original_context_length", "tensor_data_layout"}

_SINGLE_DIGITS = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")
"""Splits of text that llama.cpp makes before GPT-2's own: every digit stands alone."""

_LIKE_GPT2 = (None, "default", "gpt-2", "gpt2")
"""Splits that transformers makes where it knows no other; a file without one, or with "default", does not say more."""


@dataclass(frozen=True)
class GgufFile:
    """A file without its data: tensors in file order, and what it states, long lists left out.

    ``rope_factors`` divide the rotary frequencies, one for each pair of dimensions.
    """

    path: Path
    architecture: str
    tensors: tuple[Tensor, ...]
    facts: dict[str, Any]
    rope_factors: tuple[float, ...] | None

    def stored_as(self) -> str:
        """Its quantisation: the types of its weights, the most frequent first."""
        counts = Counter(tensor.dtype for tensor in self.tensors if len(tensor.shape) > 1)
        return f"GGUF {', '.join(kind for kind, _ in counts.most_common())}"


def read_gguf(path: Path) -> GgufFile:
    """Read a file's header. Raises InputError where it is broken, in parts, or of an architecture not known here."""
    if importlib.util.find_spec("gguf") is None:
        raise InputError(f"{path}: reading GGUF files needs the gguf package; pip install 'kvprofile[gguf]'")
    from gguf import GGUFReader

    try:
        reader = GGUFReader(path)
        facts = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("tokenizer.")}
        tensors = [
            Tensor(
                found.name,
                found.tensor_type.name,
                tuple(int(size) for size in reversed(found.shape)),
                int(found.data_offset),
                int(found.data_offset + found.n_bytes),
            )
            for found in reader.tensors
        ]
        factors = [found.data for found in reader.tensors if found.name == _ROPE_FACTORS]
        rope_factors = tuple(float(factor) for factor in factors[0]) if factors else None
        size = path.stat().st_size
    except Exception as error:  # the reader trusts its file, and fails in numpy's ways where it should not
        raise InputError(f"{path} is truncated or not a GGUF file: {first_line(error)}") from error
    if any(tensor.end > size for tensor in tensors) or not tensors:
        raise InputError(f"{path} is truncated: it has {size} bytes and its tensors end later; download it again")
    architecture = plain(facts.get("general.architecture", ""))[:100]
    if int(facts.get("split.count") or 1) > 1:
        raise InputError(f"{path} is one of several parts; join them first: llama-gguf-split --merge FIRST_PART WHOLE")
    if architecture not in ARCHITECTURES:
        raise InputError(
            f"{path}: kvprofile reads GGUF files of {', '.join(ARCHITECTURES)}, not of {architecture or 'no name'}; "
            "give the model's safetensors checkpoint"
        )
    return GgufFile(path, architecture, tuple(tensors), facts, rope_factors)


def gguf_config(file: GgufFile) -> PretrainedConfig:
    """The config that transformers reads, with the file's RoPE factors.

    Raises InputError where the file states something that the config does not say too.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(file.path.parent, gguf_file=file.path.name, local_files_only=True)
    except Exception as error:  # readers and configs raise all kinds
        raise InputError(f"{file.path}: {first_line(error)}") from error
    config._attn_implementation = None
    prefix = f"{file.architecture}."
    size = file.facts.get(f"{prefix}attention.key_length")
    if isinstance(size, int) and size > 0:  # transformers leaves its default for some architectures
        config.head_dim = size
    for key, value in file.facts.items():
        if not key.startswith(prefix) or key.removeprefix(prefix) in _WITHOUT_EFFECT:
            continue
        stated = _stated_by(config, key.removeprefix(prefix))
        if not _agree(value, stated):
            read = "does not read" if stated is None else f"reads as {stated}"
            raise InputError(
                f"{file.path} states {key} = {plain(value)[:100]}, which transformers {read}; "
                "give the model's safetensors checkpoint"
            )
    if file.rope_factors is not None:
        _set_rope_factors(config, file)
    return config


def _stated_by(config: PretrainedConfig, key: str) -> Any:
    """What a config says for a file's key; None where it says nothing."""
    if key == "rope.freq_base":
        return (getattr(config, "rope_parameters", None) or {}).get("rope_theta")
    names = _SAME_AS.get(key, ())
    found = next((getattr(config, name) for name in names if getattr(config, name, None) is not None), None)
    if found is None and names == ("head_dim",):
        return config.hidden_size // config.num_attention_heads
    return found


def _agree(stated: Any, read: Any) -> bool:
    """Whether a file's value is the config's; a list of equal values, one for each layer, is that value."""
    if isinstance(stated, list) and len({*map(str, stated)}) == 1:
        stated = stated[0]
    if isinstance(stated, int | float) and isinstance(read, int | float):
        return math.isclose(stated, read, rel_tol=1e-5)
    return read is None and stated in (0, False, "none")


def _set_rope_factors(config: PretrainedConfig, file: GgufFile) -> None:
    """Llama 3's scaling as its outcome, one factor for each frequency: longrope without a change of length."""
    factors = list(file.rope_factors or ())
    if len(factors) != config.head_dim // 2 or not all(math.isfinite(factor) and factor > 0 for factor in factors):
        raise InputError(f"{file.path}: {_ROPE_FACTORS} has {len(factors)} factors for heads of size {config.head_dim}")
    config.rope_parameters = {
        "rope_type": "longrope",
        "rope_theta": config.rope_parameters["rope_theta"],
        "short_factor": factors,
        "long_factor": factors,
        "original_max_position_embeddings": config.max_position_embeddings,
        "attention_factor": 1.0,
    }


def check_values(file: GgufFile, names: Sequence[str], values: int) -> None:
    """Raise InputError unless the file holds as many values as a model of those tensors, RoPE factors left out."""
    stored = sum(tensor.count for tensor in file.tensors if tensor.name != _ROPE_FACTORS)
    if stored != values:
        raise InputError(
            f"{file.path} holds {stored:,} values in {len(file.tensors)} tensors, the model that it describes has "
            f"{values:,} in {len(names)}; give the model's safetensors checkpoint"
        )


def set_pre_tokenizer(path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Split text as the file says: transformers takes GPT-2's splits where it does not know the name of others.

    The same words then have other ids: two line breaks before a digit become two tokens. Raises InputError for splits
    that neither it nor this module knows.
    """
    from gguf import GGUFReader
    from tokenizers import pre_tokenizers

    fields = GGUFReader(path).fields
    model, split = (
        fields[name].contents() if name in fields else None for name in ("tokenizer.ggml.model", "tokenizer.ggml.pre")
    )
    if model != "gpt2" or split in _LIKE_GPT2 or split in _known_to_transformers(split):
        return
    if split not in _SINGLE_DIGITS:
        raise InputError(
            f"{path} splits text as {plain(split)[:100]} does, which transformers does not know; "
            "give the model's safetensors checkpoint"
        )
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )


def _known_to_transformers(split: str) -> Container[str]:
    """The splits that transformers makes by name; of a release that keeps no list none is doubted but ours."""
    try:
        from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS
    except ImportError:
        return () if split in _SINGLE_DIGITS else (split,)
    return GGUF_PRE_TOKENIZER_SPLITS  # type: ignore[no-any-return]


@contextmanager
def by_itself(path: Path) -> Iterator[Path]:
    """A folder that holds the file and nothing else: transformers would take a tokenizer.json next to it instead."""
    with tempfile.TemporaryDirectory(prefix="kvprofile-") as folder:
        (Path(folder) / path.name).symlink_to(path.resolve())
        yield Path(folder)
