"""Random checkpoints of 0.5 to 0.7 billion bfloat16 parameters with the families' proportions."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from models.registry import parse_config
from shards.verify import model_slices

CONFIGS: dict[str, dict[str, Any]] = {
    "dbrx": {
        "architectures": ["DbrxForCausalLM"],
        "model_type": "dbrx",
        "d_model": 1024,
        "n_heads": 8,
        "n_layers": 6,
        "max_seq_len": 32768,
        "vocab_size": 32000,
        "attn_config": {"clip_qkv": 8, "kv_n_heads": 2, "rope_theta": 500000.0},
        "ffn_config": {
            "ffn_hidden_size": 1792,
            "moe_num_experts": 16,
            "moe_top_k": 4,
            "moe_normalize_expert_weights": 1.0,
        },
    },
    "phimoe": {
        "architectures": ["PhimoeForCausalLM"],
        "model_type": "phimoe",
        "hidden_size": 1024,
        "intermediate_size": 1600,
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "num_local_experts": 16,
        "vocab_size": 32064,
        "max_position_embeddings": 32768,
        "attention_bias": True,
        "lm_head_bias": True,
        "rope_theta": 10000.0,
    },
    "jamba": {
        "architectures": ["JambaForCausalLM"],
        "model_type": "jamba",
        "hidden_size": 1024,
        "intermediate_size": 2048,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "num_experts": 16,
        "num_experts_per_tok": 2,
        "vocab_size": 32768,
        "max_position_embeddings": 32768,
    },
}


def write_mid(family: str, folder: Path, seed: int = 0) -> int:
    """Write config.json and model.safetensors; returns the number of parameters."""
    raw = {**CONFIGS[family], "torch_dtype": "bfloat16", "tie_word_embeddings": False}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(raw))
    generator = torch.Generator().manual_seed(seed)
    tensors = dict(_tensors(raw, generator))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return sum(tensor.numel() for tensor in tensors.values())


def _tensors(raw: dict[str, Any], generator: torch.Generator) -> Iterator[tuple[str, Tensor]]:
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
            values = 1.0 + 0.1 * values if "norm" in name or name.endswith(".D") else 0.1 * values
        else:
            values = values / math.sqrt(shape[-1])
        yield name, values.to(torch.bfloat16)
