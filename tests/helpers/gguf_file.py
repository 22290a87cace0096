"""GGUF files of tiny models, written with the gguf package as llama.cpp's converter does."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np

from tests.helpers.models import POCKET

NAMES = {"llama": gguf.MODEL_ARCH.LLAMA, "qwen2": gguf.MODEL_ARCH.QWEN2, "qwen3": gguf.MODEL_ARCH.QWEN3}


def _permuted(weight, heads):
    """Rows of q and k as llama.cpp's Llama rotates them: pairs next to each other, not half a head apart."""
    return weight.reshape(heads, 2, weight.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(
    path: Path, model, *, quantisation="F32", facts=(), tensors=(), template=True, split="smollm"
) -> dict[str, np.ndarray]:
    """Write a model; gives its weights as the file holds them, under transformers' names, in float32.

    ``facts`` are more keys (name, value) without the architecture in front, ``tensors`` more tensors.
    """
    config = model.config
    kind = gguf.GGMLQuantizationType[quantisation]
    writer = gguf.GGUFWriter(path, config.model_type)
    writer.add_name("tiny")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_rope_dimension_count(head_size)
    if config.model_type == "qwen3":
        writer.add_key_length(head_size)
        writer.add_value_length(head_size)
    for name, value in facts:
        add = writer.add_string if isinstance(value, str) else writer.add_float32
        (writer.add_array if isinstance(value, list) else add)(f"{config.model_type}.{name}", value)
    _add_tokenizer(writer, template, split)
    names = gguf.get_tensor_name_map(NAMES[config.model_type], config.num_hidden_layers)
    held = {}
    for name, values in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        weight = values.float().numpy()
        projection = name.split(".")[-2]
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(projection)
        permuted = config.model_type == "llama" and heads and weight.ndim == 2
        stored = _permuted(weight, heads) if permuted else weight
        stem, ending = name.rpartition(".")[::2]
        packed = kind if weight.ndim == 2 else gguf.GGMLQuantizationType.F32
        data = gguf.quants.quantize(np.ascontiguousarray(stored), packed)
        writer.add_tensor(f"{names.get_name(stem)}.{ending}", data, raw_dtype=packed)
        unpacked = gguf.quants.dequantize(data, packed).reshape(weight.shape)
        if permuted:  # rows back where they were
            order = _permuted(np.arange(weight.shape[0])[:, None], heads)[:, 0]
            unpacked = unpacked[np.argsort(order)]
        held[name] = unpacked
    for name, values in tensors:
        writer.add_tensor(name, np.asarray(values, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return held


def _add_tokenizer(writer, template, split):
    tokenizer = json.loads((POCKET / "tokenizer.json").read_text())
    vocabulary = sorted(tokenizer["model"]["vocab"].items(), key=lambda entry: entry[1])
    special = {entry["content"] for entry in tokenizer["added_tokens"]}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split)
    writer.add_token_list([token for token, _ in vocabulary])
    control, normal = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL
    writer.add_token_types([control if token in special else normal for token, _ in vocabulary])
    writer.add_token_merges([" ".join(pair) for pair in tokenizer["model"]["merges"]])
    writer.add_pad_token_id(0)
    writer.add_eos_token_id(3)
    if template:
        writer.add_chat_template((POCKET / "chat_template.jinja").read_text())
