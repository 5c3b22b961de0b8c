"""DBRX against Transformers, one case per twist of its configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from models.registry import load_config
from tests.layouts import split_dbrx_experts
from tests.models.driver import Chunk, Served, in_chunks, read_checkpoint, tokens_of
from tests.models.oracle import (
    assert_all_ways,
    assert_close,
    assert_same_bits,
    edit_config,
    reference,
    tiny,
    unclamped_reference,
    write_checkpoint,
)

TOKENS = tokens_of(1, 40)


def attn(**keys: Any) -> dict[str, Any]:
    return {"attn_config": keys}


def ffn(**keys: Any) -> dict[str, Any]:
    return {"ffn_config": keys}


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param({}, id="base"),
        pytest.param(attn(clip_qkv=0.5), id="clamp bites"),
        pytest.param(attn(clip_qkv=8), id="clamp is an int"),
        pytest.param(attn(clip_qkv=0), id="clamp to zero"),
        pytest.param(attn(kv_n_heads=1), id="one kv head"),
        pytest.param(attn(kv_n_heads=4), id="all kv heads"),
        pytest.param(ffn(moe_normalize_expert_weights=None), id="no norm of the weights"),
        pytest.param(ffn(moe_normalize_expert_weights=2.0), id="2-norm"),
        pytest.param(ffn(moe_normalize_expert_weights=3.0), id="3-norm"),
        pytest.param(ffn(moe_top_k=1), id="one expert per token"),
        pytest.param(ffn(moe_top_k=4), id="every expert"),
        pytest.param(ffn(moe_num_experts=1, moe_top_k=1), id="a single expert"),
        pytest.param(ffn(ffn_act_fn={"name": "relu"}), id="relu"),
        pytest.param(ffn(ffn_act_fn={"name": "gelu", "approximate": "tanh"}), id="extra ignored"),
        pytest.param({"d_model": 36, "n_heads": 6, "vocab_size": 131}, id="odd widths"),
    ],
)
def test_matches_transformers_every_way(tmp_path: Path, overrides: dict[str, Any]) -> None:
    folder = tiny("dbrx", tmp_path, n_layers=2, **overrides)
    assert_all_ways(folder, reference(folder, TOKENS), TOKENS)


def test_contexts_of_several_splits(tmp_path: Path) -> None:
    tokens = tokens_of(2, 150)
    folder = tiny("dbrx", tmp_path)
    assert_all_ways(folder, reference(folder, tokens), tokens)


def test_null_clip_does_not_clamp(tmp_path: Path) -> None:
    folder = tiny("dbrx", tmp_path, n_layers=2, attn_config={"clip_qkv": None})
    assert_all_ways(folder, unclamped_reference(folder, TOKENS), TOKENS)


def test_int_expert_weight_norm_is_the_float(tmp_path: Path) -> None:
    folder = tiny("dbrx", tmp_path, n_layers=2)
    expected = reference(folder, TOKENS)
    edit_config(folder, ffn_config={"moe_normalize_expert_weights": 1})
    assert_close(Served.open(folder).step([Chunk(0, 0, TOKENS)])[0], expected)


def test_rope_base_is_attn_configs(tmp_path: Path) -> None:
    folder = tiny("dbrx", tmp_path, n_layers=2)
    far = Served.open(folder).step([Chunk(0, 0, TOKENS)])[0]
    edit_config(folder, attn_config={"rope_theta": 10000})
    near = Served.open(folder).step([Chunk(0, 0, TOKENS)])[0]
    assert_close(near, reference(folder, TOKENS))
    assert not torch.allclose(near, far, atol=1e-2)


def test_norm_eps_is_torchs(tmp_path: Path) -> None:
    # Rows of tiny variance, where eps decides the scale.
    folder = tiny("dbrx", tmp_path, n_layers=1)
    tensors = read_checkpoint(folder)
    tensors["transformer.wte.weight"].mul_(1e-3)
    write_checkpoint(folder, tensors)
    assert_close(Served.open(folder).step([Chunk(0, 0, TOKENS)])[0], reference(folder, TOKENS))


def test_bfloat16_every_way(tmp_path: Path) -> None:
    folder = tiny("dbrx", tmp_path, n_layers=2)
    served = Served.open(folder, torch.bfloat16)
    full = served.step([Chunk(0, 0, TOKENS)])[0]
    assert full.dtype == torch.bfloat16
    assert_same_bits(in_chunks(served, 1, TOKENS, [1]), full, "decode steps")
    assert_same_bits(in_chunks(served, 2, TOKENS, [19, 4]), full, "chunked prefill")
    error = (full.float() - reference(folder, TOKENS)).abs().mean()
    assert error < 0.1


def test_expert_slices_are_rows_of_the_stacked_tensors(tmp_path: Path) -> None:
    config = load_config(tiny("dbrx", tmp_path))
    parts = config.expert_tensors(1, 3)
    stacked = [part.sources[0] for part in parts.values()]
    rows = [(source.name, source.start, source.stop) for source in stacked]
    prefix = "transformer.blocks.1.ffn.experts.mlp."
    assert rows == [(prefix + name, 144, 192) for name in ("w1", "v1", "w2")]
    assert [source.transpose for source in stacked] == [False, False, True]
    assert parts["down"].shape == (64, 48)


def test_mlx_layout_of_the_experts_gives_the_same_bits(tmp_path: Path) -> None:
    folder = tiny("dbrx", tmp_path, n_layers=2)
    expected = Served.open(folder).step([Chunk(0, 0, TOKENS)])[0]
    split_dbrx_experts(folder)
    assert_same_bits(Served.open(folder).step([Chunk(0, 0, TOKENS)])[0], expected, "mlx layout")
