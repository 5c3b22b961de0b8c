"""Transformers departs from the models without each remedy: when it no longer does, drop it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor

from tests.models.driver import tokens_of
from tests.models.oracle import tiny
from tests.parity.remedies import REMEDIES, drop_keys, edit_config, load, logits_of
from tests.parity.remedies import full_forward as whole
from tests.tiny import write_tiny

Test = TypeVar("Test", bound=Callable[..., Any])

TOKENS = tokens_of(41, 20)
DEPARTURES: set[str] = set()
"""Remedies that a test below shows to be needed."""


def departs_without(name: str) -> Callable[[Test], Test]:
    """Mark a test that fails once Transformers no longer needs the remedy."""

    def mark(test: Test) -> Test:
        DEPARTURES.add(name)
        return test

    return mark


def test_each_remedy_is_a_needed_fixture(request: pytest.FixtureRequest) -> None:
    assert set(REMEDIES) == DEPARTURES
    for name in REMEDIES:
        assert callable(request.getfixturevalue(name))


def assert_departs(actual: Tensor, right: Tensor) -> None:
    """Far beyond rounding: a hundred times what parity allows, and more."""
    assert actual.shape == right.shape
    assert float((actual - right).abs().max()) > 0.01


@departs_without("rope_base_from_attn_config")
def test_rope_base(tmp_path: Path, rope_base_from_attn_config: Any) -> None:
    folder = write_tiny("dbrx", tmp_path, n_layers=2)
    (own,) = logits_of(load(folder), [TOKENS])
    edit_config(folder, attn_config={"rope_theta": 123.0})
    (unmoved,) = logits_of(load(folder), [TOKENS])
    assert torch.equal(own, unmoved)
    (right,) = logits_of(rope_base_from_attn_config(load(folder)), [TOKENS])
    assert_departs(own, right)


@departs_without("clip_nothing")
def test_clip(tmp_path: Path, clip_nothing: Any) -> None:
    folder = write_tiny("dbrx", tmp_path, n_layers=1, attn_config={"clip_qkv": None})
    with pytest.raises(RuntimeError, match="At least one of 'min' or 'max' must not be None"):
        whole(load(folder), TOKENS)
    whole(clip_nothing(load(folder)), TOKENS)


@departs_without("default_rope_base")
def test_default_rope_base(tmp_path: Path, default_rope_base: Any) -> None:
    folder = write_tiny("dbrx", tmp_path, n_layers=1)
    drop_keys(folder, "attn_config.rope_theta")
    with pytest.raises(AttributeError, match="no attribute 'rope_theta'"):
        load(folder)
    default_rope_base(folder)


@departs_without("float_weight_norm")
def test_weight_norm(tmp_path: Path, float_weight_norm: Any) -> None:
    folder = write_tiny("dbrx", tmp_path, n_layers=1)
    edit_config(folder, ffn_config={"moe_normalize_expert_weights": 1})
    with pytest.raises(StrictDataclassError, match="moe_normalize_expert_weights"):
        load(folder)
    float_weight_norm(folder)


@departs_without("longrope_switches_factors")
def test_longrope_factors(tmp_path: Path, longrope_switches_factors: Any) -> None:
    folder = tiny("phimoe", tmp_path)  # of context 48
    short, long = tokens_of(42, 48), tokens_of(43, 49)
    own = logits_of(load(folder), [short, long])
    right = logits_of(longrope_switches_factors(load(folder)), [short, long])
    assert torch.equal(own[0], right[0])
    assert_departs(own[1], right[1])


@departs_without("longrope_context")
def test_longrope_context(
    tmp_path: Path, longrope_switches_factors: Any, longrope_context: Any
) -> None:
    folder = tiny("phimoe", tmp_path)
    drop_keys(folder, "rope_parameters.original_max_position_embeddings")
    edit_config(folder, original_max_position_embeddings=48)
    own = logits_of(longrope_switches_factors(load(folder)), [tokens_of(44, 49)])
    right = longrope_context(longrope_switches_factors(load(folder)), 48)
    assert_departs(own[0], logits_of(right, [tokens_of(44, 49)])[0])


@departs_without("full_forward")
@torch.no_grad()
def test_second_chunk_of_jamba(tmp_path: Path, full_forward: Any) -> None:
    model = load(tiny("jamba", tmp_path))
    first = model(torch.tensor([TOKENS[:9]]), use_cache=True)
    second = model(torch.tensor([TOKENS[9:]]), past_key_values=first.past_key_values)
    assert_departs(second.logits[0], full_forward(model, TOKENS).logits[0, 9:])


@departs_without("full_forward")
@torch.no_grad()
def test_cache_without_attention(tmp_path: Path, full_forward: Any) -> None:
    model = load(tiny("jamba", tmp_path, num_hidden_layers=2))
    with pytest.raises(ValueError, match="can only be called on Attention layers"):
        model(torch.tensor([TOKENS]), use_cache=True)
    full_forward(model, TOKENS)


@departs_without("full_forward")
@torch.no_grad()
def test_decoding_after_right_padding(tmp_path: Path, full_forward: Any) -> None:
    model = load(tiny("jamba", tmp_path))
    padded, mask = torch.tensor([[*TOKENS[:9], 0, 0, 0]]), torch.tensor([[1] * 9 + [0] * 3])
    before = model(padded, attention_mask=mask, use_cache=True)
    after = model(
        torch.tensor([TOKENS[9:10]]),
        attention_mask=torch.cat([mask, torch.ones(1, 1, dtype=torch.int64)], dim=1),
        past_key_values=before.past_key_values,
    )
    assert_departs(after.logits[0, -1], full_forward(model, TOKENS[:10]).logits[0, -1])


@departs_without("full_forward")
def test_left_padding_with_biased_projections(tmp_path: Path, full_forward: Any) -> None:
    model = load(tiny("jamba", tmp_path, mamba_proj_bias=True))
    padded = _left_padded(model, TOKENS[:9], 12)
    assert_departs(padded, full_forward(model, TOKENS[:9]).logits[0])


@departs_without("full_forward")
def test_longrope_beside_a_longer_row(
    tmp_path: Path, full_forward: Any, longrope_switches_factors: Any
) -> None:
    model = longrope_switches_factors(load(tiny("phimoe", tmp_path)))
    padded = _left_padded(model, TOKENS, 60)
    assert_departs(padded, full_forward(model, TOKENS).logits[0])


@torch.no_grad()
def _left_padded(model: Any, tokens: Sequence[int], width: int) -> Tensor:
    """Logits of `tokens` in a batch with a row of `width` others."""
    padding = width - len(tokens)
    ids = torch.tensor([[0] * padding + list(tokens), tokens_of(45, width)])
    mask = torch.tensor([[0] * padding + [1] * len(tokens), [1] * width])
    logits: Tensor = model(ids, attention_mask=mask, use_cache=False).logits
    return logits[0, padding:]
