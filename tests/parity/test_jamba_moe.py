"""Jamba's experts: none, one, all of them; the arrays that a caller may want beside logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from router.step import Want
from shards.checkpoint import CheckpointError, open_model
from shards.verify import verify
from tests.models.driver import read_checkpoint
from tests.models.oracle import write_checkpoint
from tests.parity.battery import assert_close
from tests.parity.cases import case
from tests.parity.jamba import SEQUENCES, SHORT, assert_parity, jamba, schedule
from tests.parity.remedies import load

ALL = Want(logits=True, hidden_states=True, router_logits=True)
ROUTERS = Want(logits=True, router_logits=True)


@case(43, "Jamba", "num_experts 1: every layer dense, no gates, no router logits to give")
@pytest.mark.parametrize("per_token", [1, 2], ids=["one per token", "two per token"])
def test_one_expert_is_a_dense_layer(tmp_path: Path, per_token: int) -> None:
    folder = jamba(tmp_path, **SHORT, num_experts=1, num_experts_per_tok=per_token)
    assert not [n for n in read_checkpoint(folder) if "router" in n or "experts" in n]
    for arrays in assert_parity(folder, want=ROUTERS):
        assert arrays.keys() == {"logits"}


@case(43, "Jamba", "num_experts 1: every layer dense, no gates, no router logits to give")
def test_transformers_crashes_on_router_logits_of_no_layer(
    tmp_path: Path, full_forward: Any
) -> None:
    model = load(jamba(tmp_path, **SHORT, num_experts=1))
    with pytest.raises(IndexError):
        full_forward(model, SEQUENCES[2], output_router_logits=True)


@case(43, "Jamba", "num_experts 1: every layer dense, no gates, no router logits to give")
def test_a_gate_is_not_expected_with_one_expert(tmp_path: Path) -> None:
    folder = jamba(tmp_path, **SHORT, num_experts=1)
    router = "model.layers.1.feed_forward.router.weight"
    write_checkpoint(folder, {**read_checkpoint(folder), router: torch.zeros(1, 64)})
    with pytest.raises(CheckpointError, match=f"unexpected tensors: {router}"):
        verify(*open_model(folder))


@case(44, "Jamba", "one, three or all four experts to a token, weights not renormalised")
@pytest.mark.parametrize("per_token", [1, 3, 4], ids=["one", "three of four", "all four"])
def test_experts_per_token(tmp_path: Path, per_token: int) -> None:
    assert_parity(jamba(tmp_path, **SHORT, num_experts_per_tok=per_token))


@case(44, "Jamba", "one, three or all four experts to a token, weights not renormalised")
def test_eight_experts(tmp_path: Path) -> None:
    assert_parity(jamba(tmp_path, **SHORT, num_experts=8, num_experts_per_tok=3))


@case(59, "Jamba", "router logits of MoE layers alone; the last hidden state is normed")
def test_router_logits_and_hidden_states(tmp_path: Path, full_forward: Any) -> None:
    folder = jamba(tmp_path, **schedule((3, 1), (3, 2), 6))
    model = load(folder, torch.float64)
    for tokens, arrays in zip(SEQUENCES, assert_parity(folder, want=ALL), strict=True):
        theirs = full_forward(model, tokens, output_router_logits=True, output_hidden_states=True)
        expected = {"logits": theirs.logits[0]}
        for layer, logits in zip((2, 5), theirs.router_logits, strict=True):
            expected[f"router_logits.{layer}"] = logits
        for i, states in enumerate(theirs.hidden_states):
            expected[f"hidden_states.{i}"] = states[0]
        assert "hidden_states.6" in expected
        assert arrays.keys() == expected.keys()
        for name, array in arrays.items():
            assert_close(array, expected[name], name)
        normed = model.model.final_layernorm(theirs.hidden_states[5][0])
        assert (normed - expected["hidden_states.6"]).abs().max() > 0.1, "what is left of layer 5"
