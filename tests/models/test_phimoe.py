"""PhiMoE against Transformers, one case per twist of its configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from models.registry import load_config
from tests.layouts import fuse
from tests.models.driver import Chunk, Served, in_chunks, tokens_of
from tests.models.oracle import (
    assert_all_ways,
    assert_close,
    assert_same_bits,
    edit_config,
    reference,
    tiny,
)

TOKENS = tokens_of(1, 40)
BOUNDARY = 48
NO_SCALING = {"rope_type": "default", "rope_theta": 10000.0}


def logits(folder: Path, tokens: list[int]) -> torch.Tensor:
    return Served.open(folder).step([Chunk(0, 0, tokens)])[0]


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param({}, id="base, longrope"),
        pytest.param({"rope_parameters": None}, id="no scaling, default theta"),
        pytest.param({"attention_bias": False, "lm_head_bias": False}, id="no biases"),
        pytest.param({"head_dim": 32, "rope_parameters": None}, id="wide heads"),
        pytest.param({"num_key_value_heads": 1}, id="one kv head"),
        pytest.param({"router_jitter_noise": 0.1}, id="wide mixer band"),
        pytest.param({"router_jitter_noise": 0.0}, id="no mixer band"),
        pytest.param({"num_local_experts": 2}, id="two experts"),
        pytest.param({"rms_norm_eps": 1e-2}, id="large eps"),
        pytest.param({"sliding_window": 12}, id="window smaller than the prompt"),
        pytest.param({"tie_word_embeddings": True}, id="tied, with head bias"),
    ],
)
def test_matches_transformers_every_way(tmp_path: Path, overrides: dict[str, Any]) -> None:
    folder = tiny("phimoe", tmp_path, num_hidden_layers=2, **overrides)
    assert_all_ways(folder, reference(folder, TOKENS), TOKENS)


@pytest.mark.parametrize("window", [None, 70])
def test_contexts_of_several_splits(tmp_path: Path, window: int | None) -> None:
    tokens = tokens_of(2, 150)
    folder = tiny("phimoe", tmp_path, num_hidden_layers=2, sliding_window=window)
    assert_all_ways(folder, reference(folder, tokens), tokens)


@pytest.mark.parametrize("count", [BOUNDARY - 1, BOUNDARY, BOUNDARY + 1])
@pytest.mark.parametrize(
    "same",
    [
        pytest.param({}, id="both switch"),
        pytest.param({"long_factor": [1.0 + 0.05 * i for i in range(8)]}, id="only the multiplier"),
        pytest.param({"long_mscale": 1.1}, id="only the factors"),
    ],
)
def test_longrope_switches_after_the_boundary(
    tmp_path: Path, count: int, same: dict[str, Any]
) -> None:
    tokens = tokens_of(3, count)
    folder = tiny("phimoe", tmp_path, num_hidden_layers=2, rope_parameters=same)
    assert_close(logits(folder, tokens), reference(folder, tokens))


def test_longrope_regime_is_each_sequences_own(tmp_path: Path) -> None:
    short, long = tokens_of(4, BOUNDARY), tokens_of(5, BOUNDARY + 12)
    folder = tiny("phimoe", tmp_path, num_hidden_layers=2)
    served = Served.open(folder)
    together = served.step([Chunk(0, 0, short), Chunk(1, 0, long), Chunk(2, 0, short)])
    for tokens, got in zip((short, long, short), together, strict=True):
        assert_close(got, reference(folder, tokens))
        assert_same_bits(logits(folder, tokens), got, "alone")


def test_longrope_regime_follows_the_known_length_not_the_chunk(tmp_path: Path) -> None:
    tokens = tokens_of(6, BOUNDARY + 4)
    folder = tiny("phimoe", tmp_path, num_hidden_layers=2)
    full = assert_all_ways(folder, reference(folder, tokens), tokens)
    served = Served.open(folder)
    first = served.step([Chunk(0, 0, tokens[:20], len(tokens))])[0]
    assert_same_bits(first, full[:20], "first chunk of a long prompt")
    assert load_config(folder).reprefill_length == BOUNDARY


def test_hub_layout_of_the_rope_keys(tmp_path: Path) -> None:
    folder = tiny("phimoe", tmp_path, num_hidden_layers=2)
    tokens = tokens_of(7, BOUNDARY + 3)
    expected = logits(folder, tokens)
    rope = load_config(folder).long_rope  # type: ignore[attr-defined]
    scaling = {
        "type": "su",
        "short_factor": list(rope.short_factor),
        "long_factor": list(rope.long_factor),
        "short_mscale": rope.short_mscale,
        "long_mscale": rope.long_mscale,
    }
    edit_config(
        folder,
        rope_parameters=None,
        rope_theta=10000,
        rope_scaling=scaling,
        original_max_position_embeddings=BOUNDARY,
        architectures=["PhiMoEForCausalLM"],
    )
    assert_same_bits(logits(folder, tokens), expected, "hub layout")


def test_bfloat16_every_way(tmp_path: Path) -> None:
    folder = tiny("phimoe", tmp_path, num_hidden_layers=2)
    served = Served.open(folder, torch.bfloat16)
    full = served.step([Chunk(0, 0, TOKENS)])[0]
    assert_same_bits(in_chunks(served, 1, TOKENS, [1]), full, "decode steps")
    assert_same_bits(in_chunks(served, 2, TOKENS, [19, 4]), full, "chunked prefill")


def test_fused_names_give_the_same_bits(tmp_path: Path) -> None:
    folder = tiny("phimoe", tmp_path, num_hidden_layers=2)
    expected = logits(folder, TOKENS)
    fuse(folder)
    assert_same_bits(logits(folder, TOKENS), expected, "fused names")
