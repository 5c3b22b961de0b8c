"""What a decode step reads for each layer, to balance stages: a model of time, not of memory.

Decoding is as fast as memory is read, and a stage waits for the experts of its own layers.
"""

from __future__ import annotations

from math import prod

from models.interface import ModelConfig
from shards.cache_bytes import block_bytes, slot_bytes

BATCH = 16
CONTEXT = 1024
"""The step that is estimated: so many sequences of so many tokens each."""


def layer_costs(
    config: ModelConfig, itemsize: int, num_shards: int, quantization: str = "none"
) -> list[int]:
    """Bytes read for each layer in one decode step of BATCH sequences of CONTEXT tokens.

    A stage reads its layers' own weights and caches; meanwhile each of `num_shards` expert workers
    reads its share of the experts that are chosen. The first layer comes with the rows of the
    embedding table, the last one with the whole LM head. `itemsize` is that of the model's dtype.
    """
    costs = [
        weight_bytes(config, layer, itemsize, quantization)
        + cache_bytes(config, layer, itemsize)
        + expert_bytes(config, layer, itemsize if quantization == "none" else 1) // num_shards
        for layer in range(config.num_layers)
    ]
    row = config.hidden_size * itemsize
    costs[0] += BATCH * row
    costs[-1] += config.vocab_size * row if "lm" in config.heads else 0
    return costs


def weight_bytes(config: ModelConfig, layer_idx: int, itemsize: int, quantization: str) -> int:
    """The layer's own weights, which every step reads whole."""
    int8 = config.quantizable if quantization == "int8-all" else frozenset()
    return sum(
        prod(part.shape) * (1 if name in int8 else itemsize)
        for name, part in config.layer_tensors(layer_idx).items()
    )


def cache_bytes(config: ModelConfig, layer_idx: int, itemsize: int) -> int:
    """Keys and values that are seen, or recurrent states, read and written."""
    seen = min(CONTEXT, config.sliding_window or CONTEXT)
    keys_and_values = block_bytes(config, [layer_idx], seen, itemsize)
    return BATCH * (keys_and_values + 2 * slot_bytes(config, [layer_idx], itemsize))


def expert_bytes(config: ModelConfig, layer_idx: int, itemsize: int) -> int:
    """The routed experts that a step touches, wherever they are held."""
    if not config.is_moe_layer(layer_idx):
        return 0
    one = sum(prod(part.shape) for part in config.expert_tensors(layer_idx, 0).values())
    return round(num_touched(config.num_experts, config.top_k, BATCH) * one * itemsize)


def num_touched(num_experts: int, top_k: int, num_tokens: float) -> float:
    """How many experts are expected to be chosen by at least one of `num_tokens` tokens.

    Each token chooses `top_k` different ones, all alike.
    """
    missed: float = (1 - top_k / num_experts) ** num_tokens
    return num_experts * (1 - missed)
