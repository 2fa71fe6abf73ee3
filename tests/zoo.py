"""Tiny random models of the families that the engine is proven on, with weights large enough to matter.

At Transformers' initial scale a soft cap or a leak moves logits by less than rounding; here they are seen.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    CohereConfig,
    CohereForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OlmoConfig,
    OlmoForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

SIZES: dict[str, Any] = {
    "vocab_size": 264,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}
ENDS: dict[str, Any] = {"bos_token_id": 257, "eos_token_id": 257, "pad_token_id": 258}
GLU: dict[str, Any] = {
    **SIZES, **ENDS, "num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 1024,
}  # fmt: skip


def _made(kind: Any, config: Any, spread: float = 0.15) -> Any:
    torch.manual_seed(0)
    model = kind(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=spread)
            elif "norm" in name or "ln_" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval().requires_grad_(False)


def llama() -> Any:
    """Grouped key/value heads, tied head, as SmolLM2."""
    return _made(LlamaForCausalLM, LlamaConfig(**GLU, tie_word_embeddings=True))


def gpt2() -> Any:
    """Conv1D with biases, learned positions, fused q/k/v."""
    sizes = {"vocab_size": 264, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 1024}
    drops = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    return _made(GPT2LMHeadModel, GPT2Config(**sizes, **drops, bos_token_id=257, eos_token_id=257))


def gemma(window: int = 16) -> Any:
    """Gemma 2: every other layer has a window; attention scores and logits are soft-capped; 1 + w norms."""
    caps = {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0, "sliding_window": window}
    return _made(Gemma2ForCausalLM, Gemma2Config(**GLU, head_dim=8, query_pre_attn_scalar=5, **caps))


def gemma3(window: int = 16) -> Any:
    """Norms on q and k, two rotary bases, windows."""
    config = Gemma3TextConfig(**GLU, head_dim=8, sliding_window=window, sliding_window_pattern=2)
    return _made(Gemma3ForCausalLM, config)


def neox() -> Any:
    """Fused q/k/v with bias, rotary on a part of each head, attention and MLP side by side, untied head."""
    sizes = {**SIZES, **ENDS, "intermediate_size": 48, "max_position_embeddings": 1024, "rotary_pct": 0.5}
    return _made(GPTNeoXForCausalLM, GPTNeoXConfig(**sizes))


def opt() -> Any:
    """Learned positions with an offset, biases everywhere."""
    sizes = {**SIZES, **ENDS, "ffn_dim": 48, "max_position_embeddings": 1024, "word_embed_proj_dim": 32}
    return _made(OPTForCausalLM, OPTConfig(**sizes, dropout=0.0, attention_dropout=0.0))


def mistral(window: int = 16) -> Any:
    """A window on every layer."""
    return _made(MistralForCausalLM, MistralConfig(**GLU, sliding_window=window))


def cohere() -> Any:
    """Logits scaled, rotary positions interleaved, layer norms of its own."""
    return _made(CohereForCausalLM, CohereConfig(**GLU, logit_scale=0.25))


def olmo() -> Any:
    """Clamps its projections in place."""
    return _made(OlmoForCausalLM, OlmoConfig(**GLU, clip_qkv=0.5))


def falcon() -> Any:
    """Its attention is its own: positions by ALiBi, no registered function is asked."""
    sizes = {
        **SIZES,
        "bos_token_id": 257,
        "eos_token_id": 257,
        "alibi": True,
        "new_decoder_architecture": False,
    }
    return _made(FalconForCausalLM, FalconConfig(**sizes, multi_query=True))


def bloom() -> Any:
    """ALiBi made from the attention mask; no registered function is asked."""
    sizes = {"vocab_size": 264, "hidden_size": 32, "n_layer": 3, "n_head": 4}
    return _made(BloomForCausalLM, BloomConfig(**sizes, **ENDS))


FAMILIES: dict[str, Callable[[], Any]] = {
    "llama": llama, "gpt2": gpt2, "gemma": gemma, "neox": neox, "opt": opt,
}  # fmt: skip
"""Those on which every training invariant is tested."""

PACKABLE = {**FAMILIES, "gemma3": gemma3, "mistral": mistral, "cohere": cohere, "olmo": olmo}
UNPACKABLE: dict[str, Callable[[], Any]] = {"falcon": falcon, "bloom": bloom}
