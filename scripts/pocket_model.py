"""The bundled checkpoint's architecture: its shape, its structured start, attention for training, and its last form.

What it is trained on is in ``pocket_rows``, how in ``train_pocket``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

WARM_HEADS = 2
"""KV heads of layer 0 that start with a role."""

INDUCTION_LAYER = 2
"""Where heads start as induction heads if that is asked for, which shortens training by two thirds."""

POSITIONS = 4096


@dataclass(frozen=True)
class Shape:
    """What a checkpoint of this recipe may differ in."""

    layers: int = 6
    width: int = 256
    query_heads: int = 8
    kv_heads: int = 4
    head_size: int = 32
    inner: int = 512
    induction_heads: int = 0


class CausalBlocks(torch.autograd.Function):
    """Causal grouped attention for training on a CPU, a block of rows at a time, its probabilities kept for backward.

    query [B, H, T, D], key and value [B, G, T, D]. The rows of a group's query heads are multiplied together, and a
    block meets only the keys up to its end. Measured in docs/decisions against torch's fused kernel.
    """

    BLOCK = 64

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        """Output [B, H, T, D]."""
        batch, heads, tokens, size = query.shape
        groups, block = key.shape[1], CausalBlocks.BLOCK
        rows, shared = batch * groups, heads // groups
        query = (query * size**-0.5).reshape(rows, shared, tokens, size)
        key, value = key.reshape(rows, tokens, size), value.reshape(rows, tokens, size)
        future = torch.ones(block, block, dtype=torch.bool).triu(1)
        output = torch.empty_like(query)
        kept = []
        for start in range(0, tokens, block):
            stop = min(start + block, tokens)
            count = stop - start
            logits = torch.bmm(query[:, :, start:stop].reshape(rows, shared * count, size), key[:, :stop].mT)
            logits = logits.view(rows, shared, count, stop)
            logits[..., start:].masked_fill_(future[:count, :count], -torch.inf)
            probabilities = torch.softmax(logits, -1).view(rows, shared * count, stop)
            output[:, :, start:stop] = torch.bmm(probabilities, value[:, :stop]).view(rows, shared, count, size)
            kept.append(probabilities)
        ctx.save_for_backward(query, key, value, output, *kept)
        return output.view(batch, heads, tokens, size)

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx, gradient: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Gradients of query, key and value from that of the output."""
        query, key, value, output, *kept = ctx.saved_tensors  # type: ignore[attr-defined]
        rows, shared, tokens, size = query.shape
        batch, heads = gradient.shape[:2]
        gradient = gradient.reshape(rows, shared, tokens, size)
        means = (gradient.float() * output.float()).sum(-1, keepdim=True).to(gradient.dtype)
        to_query = torch.empty_like(query)
        to_key, to_value = torch.zeros(2, rows, tokens, size)
        for probabilities, start in zip(kept, range(0, tokens, CausalBlocks.BLOCK), strict=True):
            stop = min(start + CausalBlocks.BLOCK, tokens)
            flat = (rows, shared * (stop - start))
            arriving = gradient[:, :, start:stop].reshape(*flat, size)
            to_value[:, :stop] += torch.bmm(probabilities.mT, arriving)
            change = torch.bmm(arriving, value[:, :stop].mT)
            change -= means[:, :, start:stop].reshape(*flat, 1)
            change *= probabilities
            to_query[:, :, start:stop] = torch.bmm(change, key[:, :stop]).view(rows, shared, stop - start, size)
            to_key[:, :stop] += torch.bmm(change.mT, query[:, :, start:stop].reshape(*flat, size))
        shape = (batch, rows // batch, tokens, size)
        return (
            (to_query * size**-0.5).view(batch, heads, tokens, size),
            to_key.view(shape).to(key.dtype),
            to_value.view(shape).to(value.dtype),
        )


@torch.compiler.disable
def _causal_blocks(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return CausalBlocks.apply(query, key, value)


def training_attention(
    _module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, _mask: None, **_: object
) -> tuple[torch.Tensor, None]:
    """The signature of transformers' attention functions: blocks on a CPU, torch's fused kernel elsewhere."""
    if query.is_cuda:
        output = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    else:
        output = _causal_blocks(query, key, value)
    return output.transpose(1, 2).contiguous(), None


def build_model(vocabulary: int, seed: int, shape: Shape) -> Qwen2ForCausalLM:
    """The untrained model with its structured start, in float32."""
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=shape.width,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.query_heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_size,
        max_position_embeddings=POSITIONS,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=3,
    )
    model = Qwen2ForCausalLM(config)
    structured_start(model, shape)
    return model


@torch.no_grad()
def structured_start(model: Qwen2ForCausalLM, shape: Shape, bias: float = 8.0) -> None:
    """Turn WARM_HEADS KV heads of layer 0 into previous-token heads; INDUCTION_LAYER gets as many as the shape says.

    The residual's first half holds the token itself. A previous-token head attends one position back through its
    query and key biases and the rotary embedding, and writes that token's embedding into the second half. Without
    this start two cores do not leave the plateau within ten minutes.
    """
    head, group, token_dims = shape.head_size, shape.query_heads // shape.kv_heads, shape.width // 2
    half, fast, every = head // 2, 5, torch.arange(head)
    frequency = torch.tensor([model.config.rope_parameters["rope_theta"] ** (-i / half) for i in range(fast)])

    embedding = model.model.embed_tokens.weight
    embedding[:, :token_dims].normal_(0.0, 0.5)
    embedding[:, token_dims:].normal_(0.0, 0.02)

    attention = model.model.layers[0].self_attn
    for kv_head in range(WARM_HEADS):
        kv = kv_head * head
        own = slice(kv, kv + head)
        attention.k_proj.weight[own] *= 0.1
        attention.v_proj.weight[own] *= 0.1
        attention.v_proj.weight[kv + every, kv + every] = 1.0
        attention.k_proj.bias[kv : kv + fast] = bias * frequency.cos()
        attention.k_proj.bias[kv + half : kv + half + fast] = bias * frequency.sin()
        for query_head in range(kv_head * group, (kv_head + 1) * group):
            query = query_head * head
            mine = slice(query, query + head)
            attention.q_proj.weight[mine] *= 0.1
            if query_head % group == 0:  # the group's other query heads stay free to gather what names a fact
                attention.q_proj.bias[query : query + fast] = bias
                attention.o_proj.weight[:, mine] *= 0.1
                attention.o_proj.weight[token_dims + kv + every, query + every] = 1.0
    for kv_head in range(shape.induction_heads):
        _induction_head(model, shape, kv_head)


@torch.no_grad()
def _induction_head(
    model: Qwen2ForCausalLM, shape: Shape, kv_head: int, match: float = 40.0, copy: float = 1.0
) -> None:
    """Let a KV head match the current token against those before each token, on slow rotary pairs, and copy."""
    head, group, token_dims = shape.head_size, shape.query_heads // shape.kv_heads, shape.width // 2
    half, every, kv = head // 2, torch.arange(head), kv_head * head
    frequency = torch.tensor([model.config.rope_parameters["rope_theta"] ** (-i / half) for i in range(half)])
    slow = (frequency * POSITIONS < 1.6).nonzero().flatten()
    slow = torch.cat([slow, slow + half])
    matched = torch.arange(len(slow)) + kv
    attention = model.model.layers[INDUCTION_LAYER].self_attn
    attention.k_proj.weight[kv : kv + head] *= 0.05
    attention.k_proj.weight[kv + slow, token_dims + matched] = match**0.5
    attention.v_proj.weight[kv : kv + head] *= 0.1
    attention.v_proj.weight[kv + every, kv + every] = 1.0
    for query in range(kv_head * group * head, (kv_head + 1) * group * head, head):
        attention.q_proj.weight[query : query + head] *= 0.05
        attention.q_proj.weight[query + slow, matched] = match**0.5
        attention.o_proj.weight[:, query : query + head] *= 0.1
        attention.o_proj.weight[kv + every, query + every] = copy


def as_llama(model: Qwen2ForCausalLM) -> LlamaForCausalLM:
    """The same function as a Llama with attention biases, its output biases zero.

    Loaders give every checkpoint of type qwen2 Qwen2's own pre-tokenizer, and this one has its own.
    """
    shared = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "head_dim", "max_position_embeddings", "rope_parameters", "rms_norm_eps",
        "tie_word_embeddings", "pad_token_id", "bos_token_id", "eos_token_id",
    )  # fmt: skip
    config = LlamaConfig(attention_bias=True, **{name: getattr(model.config, name) for name in shared})
    llama = LlamaForCausalLM(config).to(torch.bfloat16)
    zeros = {name: torch.zeros_like(bias) for name, bias in llama.named_parameters() if name.endswith("o_proj.bias")}
    llama.load_state_dict({**{k: v.cpu() for k, v in model.state_dict().items()}, **zeros})
    return llama
