"""Loading: the tokenizer, and the weights in the dtype and on the devices that fit, each choice with its reason."""

from __future__ import annotations

import contextlib
import copy
import inspect
import io
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from kvprofile.budget.config_file import quiet_transformers
from kvprofile.budget.dtypes import MODEL_DTYPES
from kvprofile.budget.profile import ModelIdentity
from kvprofile.checkpoint.describe import Description
from kvprofile.checkpoint.gguf import by_itself, set_pre_tokenizer
from kvprofile.checkpoint.quantisation import Quantisation, multiplied_out
from kvprofile.checkpoint.rehearsal import check_found
from kvprofile.checkpoint.source import Source
from kvprofile.checkpoint.weights import read_header, weight_files
from kvprofile.errors import InputError, first_line
from kvprofile.files import sha256_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Placement:
    """Where and how a model is loaded, each choice with its reason.

    ``gpu_weight_bytes`` of a device map: how many bytes of weights each GPU takes, so that the cache has room.
    ``stored_as`` says how the weights were quantised before they were multiplied out.
    """

    device: str
    dtype: str
    device_map: bool
    reasons: tuple[str, ...]
    gpu_weight_bytes: tuple[int, ...] = ()
    stored_as: str | None = None

    @property
    def weights(self) -> str:
        """The dtype of the weights and, where they were multiplied out, what from."""
        return f"{self.dtype}, multiplied out from {self.stored_as}" if self.stored_as else self.dtype


def load_tokenizer(source: Source, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The checkpoint's tokenizer. Raises InputError where it is missing or broken."""
    from transformers import AutoTokenizer

    quiet_transformers()
    try:
        if source.gguf:
            with by_itself(source.path) as folder:
                unless_stated = {"bos_token": None, "eos_token": None}  # else transformers makes up <s> and </s>
                tokenizer = AutoTokenizer.from_pretrained(
                    folder, gguf_file=source.gguf, local_files_only=True, **unless_stated
                )
            set_pre_tokenizer(source.path, tokenizer)
            tokenizer.name_or_path = str(source.path)
        else:
            tokenizer = AutoTokenizer.from_pretrained(
                source.folder, trust_remote_code=trust_remote_code, local_files_only=True
            )
    except InputError:
        raise
    except Exception as error:  # transformers and tokenizers raise whatever their parsers raise
        raise InputError(f"{source.path}: cannot load the tokenizer: {first_line(error)}") from error
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise InputError(f"{source.folder}: no tokenizer files; copy the model's tokenizer.json there")
    if not isinstance(tokenizer.model_max_length, int | float):  # every text would be compared with it
        raise InputError(f"{source.folder}: model_max_length in tokenizer_config.json is not a number")
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

    ``cache_tokens`` is the longest cache the run will hold. Raises InputError for an unknown dtype or device, and for
    weights quantised in a way that transformers does not read.
    """
    import psutil
    import torch

    quantised = description.quantisation
    if quantised and not (quantised.in_transformers or quantised.multiplied_out):
        raise InputError(
            f"{description.source.folder}: the weights are quantised by {quantised.method}, which transformers "
            f"{version('transformers')} does not read; give the checkpoint as it was before, or use --engine vllm"
        )
    free_cuda = []
    for index in range(torch.cuda.device_count()):
        free_cuda.append(torch.cuda.mem_get_info(index)[0])
    own_dtype = str(getattr(description.config, "dtype", None) or torch.float32).removeprefix("torch.")
    placement = choose_placement(
        dtype=dtype,
        device=device,
        own_dtype=own_dtype,
        parameters=_loaded_parameters(description, own_dtype),
        cache_values=description.geometry.values_per_token * cache_tokens,
        free_cuda_bytes=free_cuda,
        free_host_bytes=psutil.virtual_memory().available,
    )
    if quantised is None or not (quantised.multiplied_out or _unpacking(quantised, placement.device)):
        return placement
    reason = f"weights multiplied out from {quantised.method}; inputs, which serving may round too, are not rounded"
    return replace(placement, reasons=(*placement.reasons, reason), stored_as=quantised.method)


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
    """The choice of ``place`` as a pure function of sizes: parameters and cache in values, memory in bytes.

    Raises InputError for an unknown dtype or device, and where the cache alone does not fit on the GPUs.
    """
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
        raise InputError(f"unknown device {device!r}; use auto, cpu, cuda or cuda:N")
    if device.startswith("cuda") and not free_cuda_bytes:
        raise InputError(f"device {device!r} asked for, but torch sees no CUDA device; use --device cpu")
    if dtype not in ("auto", *MODEL_DTYPES):
        raise InputError(f"unknown dtype {dtype!r}; use one of auto, {', '.join(MODEL_DTYPES)}")
    reasons = []
    if device == "auto":
        device = "cuda" if free_cuda_bytes else "cpu"
        reasons.append(f"device {device}: " + ("torch sees a GPU" if free_cuda_bytes else "torch sees no GPU"))
    else:
        reasons.append(f"device {device}: asked for")
    if dtype != "auto":
        reasons.append(f"dtype {dtype}: asked for")
    elif device.startswith("cuda"):
        dtype = own_dtype if own_dtype in MODEL_DTYPES else "bfloat16"
        reasons.append(f"dtype {dtype}: the checkpoint's own, on a GPU")
    elif (parameters + cache_values) * 4 * 1.2 < free_host_bytes:
        dtype = "float32"
        reasons.append("dtype float32: exact, and weights and cache fit into memory")
    else:
        dtype = own_dtype if own_dtype in MODEL_DTYPES else "bfloat16"
        reasons.append(f"dtype {dtype}: float32 weights would not fit into memory")
    needed = (parameters + cache_values) * MODEL_DTYPES[dtype]
    device_map = False
    room: tuple[int, ...] = ()
    if device == "cuda":
        largest = max(free_cuda_bytes, default=0)
        device_map = needed * 1.1 > largest
        if device_map:
            where = "GPUs" if len(free_cuda_bytes) > 1 and needed * 1.1 < sum(free_cuda_bytes) else "GPU and CPU memory"
            reasons.append(
                f"device map over {where}: weights and cache need {_gib(needed)}, the largest GPU has {_gib(largest)}"
            )
            room = weight_room(free_cuda_bytes, cache_values * MODEL_DTYPES[dtype])
    return Placement(device, dtype, device_map, tuple(reasons), room)


def weight_room(free_cuda_bytes: Sequence[int], cache_bytes: int) -> tuple[int, ...]:
    """Bytes of weights for each GPU next to its share of the cache, with a tenth left for activations.

    The whole cache lies on GPUs, also that of layers whose weights wait in CPU memory, because they run on a GPU.
    Raises InputError where the cache alone does not fit.
    """
    usable = [int(free * 0.9) for free in free_cuda_bytes]
    if cache_bytes >= sum(usable):
        raise InputError(
            f"the cache needs {_gib(cache_bytes)}, the GPUs have {_gib(sum(free_cuda_bytes))} free; "
            "pass a smaller --context-tokens, or --device cpu"
        )
    return tuple(int(free * (1 - cache_bytes / sum(usable))) for free in usable)


def load_model(description: Description, placement: Placement, *, needs_head: bool = True) -> PreTrainedModel:
    """Load the weights, for inference. Raises InputError where files are missing, broken or do not fit.

    Without ``needs_head`` weights may lack the LM head, which reconstruction scores do not use.
    """
    import psutil
    import torch

    quiet_transformers()
    source = description.source
    options: dict[str, Any] = {"dtype": getattr(torch, placement.dtype), "output_loading_info": True}
    if placement.device_map:
        room: dict[int | str, int] = dict(enumerate(placement.gpu_weight_bytes))
        options["device_map"] = "auto"
        if room:
            options["max_memory"] = {**room, "cpu": psutil.virtual_memory().available}
    unpacking = _unpacking(description.quantisation, placement.device)
    if unpacking is not None:
        options["quantization_config"] = unpacking
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # bars of what quantisers call
            model, found = _from_pretrained(description, options)
        if not placement.device_map:
            model.to(placement.device)
    except InputError:
        raise
    except Exception as error:  # loaders of quantised and sharded weights raise all kinds
        raise InputError(f"{source.path}: cannot load the weights: {first_line(error)}") from error
    check_found(source.path, found, needs_head=needs_head)
    model.requires_grad_(False)
    return model.eval()


def _from_pretrained(description: Description, options: dict[str, Any]) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model, and what transformers reports of loading it."""
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    folder, config = description.source.folder, description.config
    if description.source.gguf:
        options |= {"gguf_file": description.source.gguf, "local_files_only": True}
        loaded = AutoModelForCausalLM.from_pretrained(folder, config=config, **options)
    elif description.quantisation and description.quantisation.multiplied_out:
        files = weight_files(folder)
        tensors = [tensor for file in files for tensor in read_header(file)]
        config = copy.deepcopy(config)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        loaded = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].from_pretrained(
            None, config=config, state_dict=multiplied_out(files, tensors), **options
        )
    else:
        loaded = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            use_safetensors=True,
            trust_remote_code=description.trust_remote_code,
            local_files_only=True,
            ignore_mismatched_sizes=True,  # refused below, by name
            **options,
        )
    model, found = loaded
    return model, found


def _unpacking(quantised: Quantisation | None, device: str) -> Any:
    """A config that makes transformers multiply quantised weights out while it loads them; None where it need not.

    It would unpack compressed-tensors when the whole model's forward is called, which scoring does not do; and its
    kernels for FP8 and MXFP4 need a GPU.
    """
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

    kind = AUTO_QUANTIZATION_CONFIG_MAPPING.get(quantised.method) if quantised else None
    if quantised is None or kind is None or "dequantize" not in inspect.signature(kind.__init__).parameters:
        return None
    return kind(dequantize=True) if quantised.method == "compressed-tensors" or device == "cpu" else None


def weight_bytes_in(description: Description, dtype: str) -> int:
    """Bytes of the weights in a dtype. Weights that stay quantised count as they are stored."""
    quantised = description.quantisation
    if quantised and not quantised.multiplied_out:
        return description.weight_bytes
    return description.parameters * MODEL_DTYPES[dtype]


def _loaded_parameters(description: Description, own_dtype: str) -> int:
    """Values of the weights; weights that stay quantised count as the values that would take their bytes."""
    quantised = description.quantisation
    if quantised and not quantised.multiplied_out:
        return description.weight_bytes // MODEL_DTYPES.get(own_dtype, 2)
    return description.parameters


def _gib(count: float) -> str:
    return f"{count / 2**30:.1f} GiB"
