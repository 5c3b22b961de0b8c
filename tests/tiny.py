"""Tiny random checkpoints written by Transformers, and Transformers itself as the oracle."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    DbrxConfig,
    DbrxForCausalLM,
    JambaConfig,
    JambaForCausalLM,
    JambaForSequenceClassification,
    PhimoeConfig,
    PhimoeForCausalLM,
    PhimoeForSequenceClassification,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

FAMILIES = ("dbrx", "phimoe", "jamba")
VOCAB_SIZE = 97

_DEFAULTS: dict[str, dict[str, Any]] = {
    "dbrx": {
        "d_model": 64,
        "n_heads": 4,
        "n_layers": 3,
        "max_seq_len": 256,
        "attn_config": {"clip_qkv": 2.0, "kv_n_heads": 2, "rope_theta": 500000.0},
        "ffn_config": {
            "hidden_size": 64,
            "ffn_hidden_size": 48,
            "moe_num_experts": 4,
            "moe_top_k": 2,
            "moe_normalize_expert_weights": 1.0,
        },
    },
    "phimoe": {
        "hidden_size": 64,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 256,
        "attention_bias": True,
        "lm_head_bias": True,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.0 + 0.05 * i for i in range(8)],
            "long_factor": [2.0 + 0.4 * i for i in range(8)],
            "short_mscale": 1.1,
            "long_mscale": 1.3,
            "original_max_position_embeddings": 48,
        },
    },
    "jamba": {
        "hidden_size": 64,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "attn_layer_period": 4,
        "attn_layer_offset": 2,
        "max_position_embeddings": 256,
    },
}
_CLASSES: dict[str, tuple[Any, Any]] = {
    "dbrx": (DbrxConfig, DbrxForCausalLM),
    "phimoe": (PhimoeConfig, PhimoeForCausalLM),
    "jamba": (JambaConfig, JambaForCausalLM),
}
_CLASSIFIERS: dict[str, Any] = {
    "phimoe": PhimoeForSequenceClassification,
    "jamba": JambaForSequenceClassification,
}


def write_tiny(
    family: str,
    folder: Path,
    seed: int = 0,
    *,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "1GB",
    classifier: bool = False,
    **overrides: Any,
) -> Path:
    """Save a random checkpoint of `family` into `folder`; `overrides` are config.json keys.

    A dict override replaces only the keys it names. Small `max_shard_size` (`40KB`) gives a
    sharded checkpoint with an index; `classifier` one that ends in a classification head.
    """
    options: dict[str, Any] = {"vocab_size": VOCAB_SIZE, **_DEFAULTS[family]}
    for key, value in overrides.items():
        known = options.get(key)
        merged = (
            {**known, **value} if isinstance(known, dict) and isinstance(value, dict) else value
        )
        options[key] = merged
    config_class, model_class = _CLASSES[family]
    if classifier:
        model_class = _CLASSIFIERS[family]
    model = model_class(config_class(**options))
    _randomise(model, torch.Generator().manual_seed(seed))
    model.to(dtype).save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


def _randomise(model: Any, generator: torch.Generator) -> None:
    """Away from every initial value, so that a swapped or missing parameter shows in the logits."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("A_log"):
                parameter.copy_(torch.arange(1.0, parameter.shape[-1] + 1).log() + 0.3 * noise)
            elif name.endswith("dt_proj.bias"):
                parameter.copy_(0.5 * noise - 1.0)
            elif name.endswith("bias"):
                parameter.copy_(0.3 * noise)
            elif parameter.dim() == 1:  # norms and Mamba's D
                parameter.copy_(1.0 + 0.3 * noise)
            else:
                gain = 2.0 if "lm_head" in name or "router" in name else 1.0
                parameter.copy_(gain * noise / math.sqrt(parameter.shape[-1]))


def load_reference(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """Transformers' model of a checkpoint, corrected where Transformers 5 departs from the model.

    DBRX takes its RoPE base from `attn_config` (Databricks' own code); PhiMoE switches its
    LongRoPE factors, not only the multiplier, past the original context (Microsoft's own code).
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    config = model.config
    if config.model_type == "dbrx":
        config.rope_parameters["rope_theta"] = float(config.attn_config.rope_theta)
        model = model.from_pretrained(folder, config=config, dtype=dtype)
    if config.model_type == "phimoe" and config.rope_parameters["rope_type"] == "longrope":
        _switch_factors(model.model.rotary_emb)
    return model.eval()


def _switch_factors(rotary: Any) -> None:
    def before_forward(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        positions = kwargs.get("position_ids", args[1] if len(args) > 1 else None)
        seq_len = int(positions.max()) + 1
        module.rope_init_fn = lambda config: ROPE_INIT_FUNCTIONS["longrope"](
            config, seq_len=seq_len
        )

    rotary.register_forward_pre_hook(before_forward, with_kwargs=True)


@torch.no_grad()
def reference_logits(model: Any, tokens: Sequence[int]) -> Tensor:
    """Float32 logits [len(tokens), V] of one full forward without cache."""
    logits: Tensor = model(input_ids=torch.tensor([list(tokens)]), use_cache=False).logits
    return logits[0].float()


def reference_greedy(model: Any, prompt: Sequence[int], num_tokens: int) -> list[Tensor]:
    """Float32 logits [V] that choose each of `num_tokens` greedy tokens, all recomputed from
    scratch: Transformers' own cached steps are wrong for some models and lengths."""
    tokens = list(prompt)
    rows = []
    for _ in range(num_tokens):
        rows.append(reference_logits(model, tokens)[-1])
        tokens.append(int(rows[-1].argmax()))
    return rows
