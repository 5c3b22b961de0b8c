"""What a decode step reads for each layer, counted from the files and from all choices."""

from __future__ import annotations

import json
import re
import struct
from itertools import combinations, product
from math import prod
from pathlib import Path
from typing import Any

import pytest

from models.registry import load_config
from shards.layer_costs import BATCH, CONTEXT, layer_costs, num_touched
from tests.tiny import write_tiny

QUANTISED = re.compile(
    r"attn\.(Wqkv|out_proj)|self_attn\.[qkvo]_proj|feed_forward\.(gate|up|down)_proj"
)
"""Attention projections and dense FFNs: nothing of Mamba, gates or experts."""
CASES: list[tuple[str, dict[str, Any]]] = [
    ("dbrx", {}),
    ("phimoe", {}),
    ("jamba", {}),
    ("jamba", {"num_experts": 1, "num_experts_per_tok": 1}),
]


@pytest.mark.parametrize(("num_experts", "top_k", "num_tokens"), [(4, 2, 3), (5, 1, 4), (3, 3, 2)])
def test_experts_touched_are_the_mean_over_all_choices(
    num_experts: int, top_k: int, num_tokens: int
) -> None:
    choices = list(combinations(range(num_experts), top_k))
    touched = [len(set().union(*each)) for each in product(choices, repeat=num_tokens)]
    mean = sum(touched) / len(touched)
    assert num_touched(num_experts, top_k, num_tokens) == pytest.approx(mean)


@pytest.mark.parametrize("num_shards", [1, 3])
@pytest.mark.parametrize(("family", "options"), CASES)
def test_costs_are_what_the_files_hold(
    tmp_path: Path, family: str, options: dict[str, Any], num_shards: int
) -> None:
    config = load_config(write_tiny(family, tmp_path, **options))
    costs = layer_costs(config, 4, num_shards)
    assert len(costs) == config.num_layers
    shapes = _shapes(tmp_path / "model.safetensors")
    for layer, cost in enumerate(costs):
        own = {n: s for n, s in shapes.items() if f".{layer}." in n.split("experts")[0]}
        experts = sum(prod(shape) for name, shape in own.items() if ".experts." in name)
        resident = sum(prod(shape) for shape in own.values()) - experts
        share = experts / config.num_experts * _touched(config.num_experts, config.top_k)
        ends = BATCH * 64 if layer == 0 else 0
        if layer == config.num_layers - 1:
            ends += prod(shapes["lm_head.weight"])
        expected = 4 * (resident + share / num_shards + _remembered(family, layer) + ends)
        assert cost == pytest.approx(expected, abs=4), (layer, own.keys())


@pytest.mark.parametrize("family", ["dbrx", "phimoe", "jamba"])
def test_int8_weights_count_as_bytes(tmp_path: Path, family: str) -> None:
    config = load_config(write_tiny(family, tmp_path))
    plain, experts, everything = (
        layer_costs(config, 2, 1, quantization) for quantization in ("none", "int8", "int8-all")
    )
    shapes = _shapes(tmp_path / "model.safetensors")
    for layer in range(config.num_layers):
        own = {n.split(f".{layer}.")[1]: s for n, s in shapes.items() if f".{layer}." in n}
        halved = _touched(4, 2) * 3 * 64 * 48 if config.is_moe_layer(layer) else 0
        # Rounded to whole bytes before and after.
        assert plain[layer] - experts[layer] == pytest.approx(halved, abs=2)
        int8 = [prod(s) for n, s in own.items() if QUANTISED.search(n) and len(s) == 2]
        assert experts[layer] - everything[layer] == sum(int8), own


def _shapes(file: Path) -> dict[str, list[int]]:
    with file.open("rb") as opened:
        (length,) = struct.unpack("<Q", opened.read(8))
        header = json.loads(opened.read(length))
    return {name: entry["shape"] for name, entry in header.items() if name != "__metadata__"}


def _touched(num_experts: int, top_k: int) -> float:
    """As a walk over the tokens: each one finds the others' misses alike."""
    missed = float(num_experts)
    for _ in range(BATCH):
        missed -= missed * top_k / num_experts
    return num_experts - missed


def _remembered(family: str, layer: int) -> int:
    """Elements: 2 heads of 16; in Jamba three layers of 128 channels, 3 inputs and 16 states."""
    if family == "jamba" and layer % 4 != 2:
        return BATCH * 2 * 128 * (3 + 16)
    return BATCH * CONTEXT * 2 * 2 * 16
