"""How fast this machine reads memory, and how many bytes of weights a decode step must read."""

from __future__ import annotations

import mmap
import time
from typing import Any

import torch

PROBE_BYTES = 1 << 30
PROBE_ROUNDS = 4


def read_bandwidth(threads: int) -> float:
    """Bytes per second that `threads` threads read at most, over a gigabyte in huge pages.

    The faster of a float32 sum and a float32 matrix-vector product.
    """
    torch.set_num_threads(threads)
    memory = mmap.mmap(-1, PROBE_BYTES)
    memory.madvise(mmap.MADV_HUGEPAGE)
    matrix = torch.frombuffer(memory, dtype=torch.float32).view(-1, 4096)
    matrix.fill_(1.0)
    vector = torch.ones(4096)
    best = float("inf")
    for _ in range(PROBE_ROUNDS):
        begin = time.perf_counter()
        matrix.sum()
        middle = time.perf_counter()
        matrix @ vector
        best = min(best, middle - begin, time.perf_counter() - middle)
    return PROBE_BYTES / best


def expected_experts(num_experts: int, per_token: int, batch: int) -> float:
    """Distinct experts that `batch` tokens touch in a layer if routing were uniform."""
    return num_experts * (1.0 - (1.0 - per_token / num_experts) ** batch)


def decode_bytes(sizes: dict[str, int], experts: float) -> float:
    """Bytes of distinct weights that one step reads when `experts` of each layer are touched.

    `sizes` is `weight_sizes`'s.
    """
    return 2.0 * (sizes["dense"] + experts * sizes["expert"] * sizes["moe_layers"])


def weight_sizes(raw: dict[str, Any], parameters: int) -> dict[str, int]:
    """Parameters outside experts and the embedding (the head counts), of one expert, and counts."""
    if raw["model_type"] == "dbrx":
        hidden, layers, ffn = raw["d_model"], raw["n_layers"], raw["ffn_config"]
        width, experts, top_k = ffn["ffn_hidden_size"], ffn["moe_num_experts"], ffn["moe_top_k"]
    else:
        hidden, width, layers = (
            raw[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers")
        )
        experts = raw.get("num_experts") or raw["num_local_experts"]
        top_k = raw["num_experts_per_tok"]
    if raw["model_type"] == "jamba":
        layers = len(range(raw["expert_layer_offset"], layers, raw["expert_layer_period"]))
    expert = 3 * hidden * width
    return {
        "dense": parameters - layers * experts * expert - raw["vocab_size"] * hidden,
        "expert": expert,
        "moe_layers": layers,
        "experts": experts,
        "per_token": top_k,
    }
