"""Random bfloat16 checkpoints with the families' proportions: `mid` of 0.7 to 0.9 billion
parameters, `tiny` of 12 to 15 million."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from models.registry import parse_config
from shards.verify import model_slices

MID: dict[str, dict[str, Any]] = {
    "dbrx": {
        "architectures": ["DbrxForCausalLM"],
        "model_type": "dbrx",
        "d_model": 1024,
        "n_heads": 8,
        "n_layers": 8,
        "max_seq_len": 32768,
        "vocab_size": 32000,
        "attn_config": {"clip_qkv": 8.0, "kv_n_heads": 2, "rope_theta": 500000.0},
        "ffn_config": {
            "ffn_hidden_size": 1792,
            "moe_num_experts": 16,
            "moe_top_k": 4,
            "moe_normalize_expert_weights": 1.0,
        },
    },
    "phimoe": {
        "architectures": ["PhiMoEForCausalLM"],
        "model_type": "phimoe",
        "hidden_size": 1024,
        "intermediate_size": 1600,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "num_local_experts": 16,
        "num_experts_per_tok": 2,
        "vocab_size": 32064,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-5,
        "attention_bias": True,
        "lm_head_bias": True,
        "rope_theta": 10000.0,
    },
    "jamba": {
        "architectures": ["JambaForCausalLM"],
        "model_type": "jamba",
        "hidden_size": 1024,
        "intermediate_size": 3584,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "num_experts": 16,
        "num_experts_per_tok": 2,
        "attn_layer_period": 8,
        "attn_layer_offset": 4,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "mamba_d_state": 16,
        "mamba_d_conv": 4,
        "mamba_expand": 2,
        "mamba_dt_rank": 64,
        "mamba_conv_bias": True,
        "mamba_proj_bias": False,
        "rms_norm_eps": 1e-6,
        "vocab_size": 32768,
        "max_position_embeddings": 32768,
    },
}
"""Ratios of width, expert width, heads and active experts near the families' own; per token 230 M
(DBRX), 132 M (PhiMoE) and 214 M (Jamba) parameters are active."""

_TINY: dict[str, dict[str, Any]] = {
    "dbrx": {
        "d_model": 128,
        "n_heads": 4,
        "vocab_size": 8192,
        "attn_config": {"clip_qkv": 8.0, "kv_n_heads": 1, "rope_theta": 500000.0},
        "ffn_config": {**MID["dbrx"]["ffn_config"], "ffn_hidden_size": 224},
    },
    "phimoe": {
        "hidden_size": 128,
        "intermediate_size": 192,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "vocab_size": 8192,
    },
    "jamba": {
        "hidden_size": 128,
        "intermediate_size": 448,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "mamba_dt_rank": 8,
        "vocab_size": 8192,
    },
}
CONFIGS = {"mid": MID, "tiny": {name: {**MID[name], **_TINY[name]} for name in MID}}
"""config.json by size and family."""


def write_checkpoint(
    size: str,
    family: str,
    folder: Path,
    seed: int = 0,
    changes: Mapping[str, Any] | None = None,
) -> int:
    """Write config.json and model.safetensors; returns the number of parameters.

    `changes` are keys of config.json in place of the family's own.
    """
    return write_random({**CONFIGS[size][family], **(changes or {})}, folder, seed)


def write_random(config: Mapping[str, Any], folder: Path, seed: int = 0) -> int:
    """The same for any config.json."""
    raw = {**config, "torch_dtype": "bfloat16", "tie_word_embeddings": False}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(raw))
    generator = torch.Generator().manual_seed(seed)
    tensors = dict(_tensors(raw, generator))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return sum(tensor.numel() for tensor in tensors.values())


def _tensors(raw: dict[str, Any], generator: torch.Generator) -> Iterator[tuple[str, Tensor]]:
    """Embeddings of deviation 1, so that tokens differ more than biases move them all: otherwise
    most tokens would choose the same few experts."""
    shapes: dict[str, tuple[int, ...]] = {}
    for part, _ in model_slices(parse_config(raw), "none"):
        source = part.sources[0]
        shape = tuple(reversed(part.shape)) if source.transpose else part.shape
        if source.stop is not None:
            shape = (max(source.stop, shapes.get(source.name, (0,))[0]), *shape[1:])
        shapes[source.name] = shape
    for name, shape in shapes.items():
        values = torch.randn(shape, generator=generator)
        if name.endswith("A_log"):
            values = torch.arange(1.0, shape[-1] + 1).log().expand(shape) + 0.1 * values
        elif len(shape) == 1:
            is_scale = name.endswith(".D") or ("norm" in name and not name.endswith("bias"))
            values = 0.1 * values + float(is_scale)
        elif "embed" not in name and "wte" not in name:
            values = values / math.sqrt(shape[-1])
        yield name, values.to(torch.bfloat16)
