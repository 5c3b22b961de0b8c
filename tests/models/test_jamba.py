"""Jamba against Transformers, one case per twist of its configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.layouts import fuse
from tests.models.driver import Chunk, Served, in_chunks, tokens_of
from tests.models.oracle import (
    assert_all_ways,
    assert_close,
    assert_same_bits,
    reference,
    tiny,
)

TOKENS = tokens_of(1, 40)


def schedule(attn: tuple[int, int], experts: tuple[int, int], layers: int) -> dict[str, int]:
    return {
        "attn_layer_period": attn[0],
        "attn_layer_offset": attn[1],
        "expert_layer_period": experts[0],
        "expert_layer_offset": experts[1],
        "num_hidden_layers": layers,
    }


SHORT = schedule((2, 1), (2, 1), 2)


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param({}, id="base"),
        pytest.param(schedule((3, 1), (3, 0), 4), id="other periods"),
        pytest.param(schedule((1, 0), (1, 0), 2), id="attention and experts everywhere"),
        pytest.param(schedule((8, 4), (2, 1), 3), id="no attention at all"),
        pytest.param({**SHORT, "num_experts": 1, "num_experts_per_tok": 1}, id="all dense"),
        pytest.param({**SHORT, "num_experts_per_tok": 1}, id="one expert, not renormalised"),
        pytest.param({**SHORT, "num_experts_per_tok": 4}, id="every expert"),
        pytest.param({**SHORT, "mamba_conv_bias": False}, id="no conv bias"),
        pytest.param({**SHORT, "mamba_proj_bias": True}, id="projection bias"),
        pytest.param({**SHORT, "mamba_dt_rank": 3}, id="explicit rank"),
        pytest.param({**SHORT, "hidden_size": 72, "mamba_dt_rank": "auto"}, id="rank rounded up"),
        pytest.param({**SHORT, "mamba_d_conv": 2, "mamba_d_state": 5}, id="narrow conv, odd state"),
        pytest.param({**SHORT, "mamba_expand": 3, "num_key_value_heads": 1}, id="expand 3, MQA"),
        pytest.param({**SHORT, "mamba_expand": 1, "rms_norm_eps": 0.1}, id="expand 1, large eps"),
        pytest.param({**SHORT, "tie_word_embeddings": True}, id="tied"),
        pytest.param({**SHORT, "head_dim": 32}, id="wide heads"),
    ],
)
def test_matches_transformers_every_way(tmp_path: Path, overrides: dict[str, Any]) -> None:
    folder = tiny("jamba", tmp_path, **overrides)
    assert_all_ways(folder, reference(folder, TOKENS), TOKENS)


def test_contexts_of_several_splits(tmp_path: Path) -> None:
    tokens = tokens_of(2, 150)
    folder = tiny("jamba", tmp_path, **SHORT)
    assert_all_ways(folder, reference(folder, tokens), tokens)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_prompt_shorter_than_the_convolution(tmp_path: Path, count: int) -> None:
    tokens = TOKENS[: count + 6]
    folder = tiny("jamba", tmp_path, **SHORT)
    got = in_chunks(Served.open(folder), 0, tokens, [count, 1])
    assert_close(got, reference(folder, tokens))


def test_every_split_of_a_prompt(tmp_path: Path) -> None:
    tokens = TOKENS[:12]
    served = Served.open(tiny("jamba", tmp_path, **SHORT))
    full = served.step([Chunk(0, 0, tokens)])[0]
    for first in range(1, len(tokens)):
        rows = in_chunks(served, 1, tokens, [first, len(tokens)])
        assert_same_bits(rows, full, f"split after {first}")


def test_a_zeroed_slot_is_a_fresh_sequence(tmp_path: Path) -> None:
    served = Served.open(tiny("jamba", tmp_path, **SHORT))
    fresh = served.step([Chunk(0, 0, TOKENS)])[0]
    served.step([Chunk(1, 0, tokens_of(9, 23))])
    served.forget(1)
    assert_same_bits(served.step([Chunk(1, 0, TOKENS)])[0], fresh, "reused slot")


def test_a_copied_slot_is_a_fork(tmp_path: Path) -> None:
    served = Served.open(tiny("jamba", tmp_path, **schedule((8, 4), (2, 1), 2)))
    full = served.step([Chunk(0, 0, TOKENS)])[0]
    served.step([Chunk(1, 0, TOKENS[:20])])
    for cache in served.caches:
        cache.conv[2], cache.ssm[2] = cache.conv[1], cache.ssm[1]  # type: ignore[union-attr]
    rest = served.step([Chunk(2, 20, TOKENS[20:])])[0]
    assert_same_bits(rest, full[20:], "forked state")


def test_bfloat16_every_way(tmp_path: Path) -> None:
    folder = tiny("jamba", tmp_path, **SHORT)
    served = Served.open(folder, torch.bfloat16)
    full = served.step([Chunk(0, 0, TOKENS)])[0]
    assert_same_bits(in_chunks(served, 1, TOKENS, [1]), full, "decode steps")
    assert_same_bits(in_chunks(served, 2, TOKENS, [19, 4]), full, "chunked prefill")
    others = [Chunk(4, 0, tokens_of(8, 9)), Chunk(3, 0, TOKENS), Chunk(5, 0, TOKENS[:1])]
    assert_same_bits(served.step(others)[1], full, "packed batch")


def test_fused_expert_names_give_the_same_bits(tmp_path: Path) -> None:
    folder = tiny("jamba", tmp_path, **SHORT)
    expected = Served.open(folder).step([Chunk(0, 0, TOKENS)])[0]
    fuse(folder)
    assert_same_bits(Served.open(folder).step([Chunk(0, 0, TOKENS)])[0], expected, "fused names")
