"""PhiMoE's SparseMixer: its table against Transformers' own function, and inside whole models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.phimoe.modeling_phimoe import sparsemixer

from deploy.config import parse_args
from deploy.resolve import resolve
from models.config_fields import ConfigError
from models.layers.moe import sparse_mixer
from models.registry import load_config
from router.step import Want
from tests.models.driver import tokens_of
from tests.parity.battery import assert_everywhere, assert_visible
from tests.parity.cases import case
from tests.parity.checkpoints import tensors_of
from tests.parity.remedies import drop_keys, edit_config, load, logits_of
from tests.tiny import write_tiny

SEQUENCES = [tokens_of(1, 24), tokens_of(2, 1), tokens_of(3, 9)]

# Name → logits of four experts.
TABLE = {
    "near tie inside the band": [1.0, 0.99, 0.5, 0.0],
    "near tie outside the band": [1.0, 0.97, 0.5, 0.0],
    "near tie in reverse order": [0.0, 0.5, 0.99, 1.0],
    "two equal": [1.0, 1.0, 0.5, 0.0],
    "three equal": [0.5, 1.0, 1.0, 1.0],
    "equal seconds": [1.0, 2.0, 0.5, 1.0],
    "all zero": [0.0, 0.0, 0.0, 0.0],
    "zero on top": [0.0, -0.001, -1.0, 0.0],
    "one above three equal negatives": [2.0, -2.0, -2.0, -2.0],
    "negative maximum": [-1.0, -1.005, -2.0, -3.0],
    "negative seconds, near tie": [3.0, -0.5, -0.505, -4.0],
    "wide apart": [9.0, -7.0, 4.0, 0.1],
}
# Microsoft's definition, by hand: ids and weights at a jitter of 0.01.
WORKED = {
    "near tie inside the band": ([0, 1], [0.5025, 1.0]),
    "two equal": ([0, 1], [0.5, 1.0]),
    "all zero": ([0, 1], [0.25, 1 / 3]),
    "one above three equal negatives": ([0, 1], [1.0, 1 / 3]),
    "negative maximum": ([0, 1], [0.50125, 1.0]),
}
JITTERS = [0.0, 0.01, 0.1, 0.5, 2.0]


def table_of(num_experts: int, dtype: torch.dtype) -> Tensor:
    """The table's logits and random ones, [n, E], some of them rounded so that ties are common."""
    generator = torch.Generator().manual_seed(num_experts)
    random = torch.randn(200, num_experts, generator=generator)
    coarse = (4 * random).round() / 4
    rows = [random, coarse, 1.0 + 0.02 * random, -1.0 + 0.02 * random]
    if num_experts == 4:
        rows.append(torch.tensor(list(TABLE.values())))
    return torch.cat(rows).to(dtype)


@case(33, "PhiMoE", "SparseMixer bit for bit: ties, bands, zeros, negative maxima, any jitter")
@pytest.mark.parametrize("jitter", JITTERS)
@pytest.mark.parametrize("num_experts", [2, 4, 16])
def test_table(num_experts: int, jitter: float) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        logits = table_of(num_experts, dtype)
        weights, ids = sparsemixer(logits, jitter_eps=jitter, training=False)
        our_ids, our_weights = sparse_mixer(logits, jitter)
        assert torch.equal(our_ids, ids), f"{dtype}"
        assert torch.equal(our_weights, weights), f"{dtype}"
        assert our_weights.dtype == dtype
        # The oracle has no batch effects here, so neither may we: one row at a time.
        for row in range(0, len(logits), 37):
            one_ids, one_weights = sparse_mixer(logits[row : row + 1], jitter)
            assert torch.equal(one_ids[0], ids[row])
            assert torch.equal(one_weights[0], weights[row])


@case(33, "PhiMoE", "SparseMixer's worked values")
@pytest.mark.parametrize("name", WORKED)
def test_worked_values(name: str) -> None:
    ids, weights = sparse_mixer(torch.tensor([TABLE[name]]), 0.01)
    expected_ids, expected_weights = WORKED[name]
    assert ids.tolist() == [expected_ids]
    torch.testing.assert_close(weights, torch.tensor([expected_weights]), atol=1e-4, rtol=0)


@case(33, "PhiMoE", "exact ties at jitter 0 share the weight, anything lower is dropped")
def test_no_jitter() -> None:
    ids, weights = sparse_mixer(torch.tensor([[1.0, 0.999, 1.0, 0.999]]), 0.0)
    assert (ids.tolist(), weights.tolist()) == ([[0, 2]], [[0.5, 1.0]])


def with_gate_logits(folder: Path, rows: list[list[float]]) -> Path:
    """A model with one layer per row, whose gate gives every token exactly that row's logits."""
    write_tiny("phimoe", folder, num_hidden_layers=len(rows), num_local_experts=len(rows[0]))
    with tensors_of(folder) as tensors:
        for layer, row in enumerate(rows):
            # What the experts see is the norm's bias alone; its first element, 1, is all that
            # the gate reads.
            prefix = f"model.layers.{layer}."
            tensors[f"{prefix}post_attention_layernorm.weight"].zero_()
            tensors[f"{prefix}post_attention_layernorm.bias"].mul_(3.0)[0] = 1.0
            gate = tensors[f"{prefix}block_sparse_moe.gate.weight"].zero_()
            gate[:, 0] = torch.tensor(row)
    return folder


@case(33, "PhiMoE", "SparseMixer's table as the gates of a model, one layer per row")
@pytest.mark.parametrize("half", [0, 1], ids=["first half", "second half"])
def test_table_in_a_model(tmp_path: Path, half: int) -> None:
    rows = list(TABLE.values())[6 * half : 6 * half + 6]
    folder = with_gate_logits(tmp_path, rows)
    expected = logits_of(load(folder), SEQUENCES)
    want = Want(logits=True, router_logits=True)
    for arrays in assert_everywhere(folder, SEQUENCES, expected, want=want):
        for layer, row in enumerate(rows):
            found = arrays[f"router_logits.{layer}"]
            assert torch.equal(found, torch.tensor(row).expand_as(found)), f"layer {layer}"


@case(33, "PhiMoE", "a model of two experts: both always picked, the second with weight 1")
@pytest.mark.parametrize("jitter", [0.01, 0.5])
def test_two_experts(tmp_path: Path, jitter: float) -> None:
    folder = write_tiny(
        "phimoe", tmp_path, num_hidden_layers=2, num_local_experts=2, router_jitter_noise=jitter
    )
    assert_everywhere(folder, SEQUENCES, logits_of(load(folder), SEQUENCES))


@case(34, "PhiMoE", "`router_jitter_noise` other than 0.01, and absent")
@pytest.mark.parametrize("jitter", [0, 0.1, 0.5, 2, None])
def test_router_jitter_noise(tmp_path: Path, jitter: float | None) -> None:
    # Gates that differ little, so that every band but the narrowest holds some of them.
    folder = write_tiny("phimoe", tmp_path, num_hidden_layers=2)
    with tensors_of(folder) as tensors:
        for name, tensor in tensors.items():
            if name.endswith("gate.weight"):
                tensor.copy_(tensor[:1] + 0.02 * tensor)
    hard_coded = logits_of(load(folder, router_jitter_noise=0.01), SEQUENCES)
    drop_keys(folder, "router_jitter_noise")
    if jitter is None:
        assert_everywhere(folder, SEQUENCES, hard_coded)
        return
    # A whole number, which Transformers does not read here, is a number like any other.
    edit_config(folder, router_jitter_noise=jitter)
    expected = logits_of(load(folder, router_jitter_noise=float(jitter)), SEQUENCES)
    assert_visible(expected[0], hard_coded[0])
    assert_everywhere(folder, SEQUENCES, expected)


@case(35, "PhiMoE", "`num_experts_per_tok` other than 2 is refused: SparseMixer always picks two")
@pytest.mark.parametrize("count", [1, 3])
def test_num_experts_per_tok(tmp_path: Path, count: int) -> None:
    folder = write_tiny("phimoe", tmp_path)
    two = logits_of(load(folder), SEQUENCES)
    edit_config(folder, num_experts_per_tok=count)
    # Why: the reference reads the key and routes to two experts all the same.
    assert torch.equal(logits_of(load(folder), SEQUENCES)[0], two[0])
    refused(folder, rf"num_experts_per_tok is {count}, but must be 2")


@case(35, "PhiMoE", "a single expert is refused: SparseMixer's second pick has no meaning")
def test_one_expert(tmp_path: Path) -> None:
    folder = write_tiny("phimoe", tmp_path, num_local_experts=1)
    assert bool(logits_of(load(folder), SEQUENCES)[0].isnan().all())
    refused(folder, r"num_local_experts is 1, but must be an integer of at least 2")


def refused(folder: Path, message: str) -> None:
    """Refused by the reader of config.json, and by whoever starts a model."""
    with pytest.raises(ConfigError, match=message):
        load_config(folder)
    options: dict[str, Any] = {"model": str(folder)}
    with pytest.raises(ValueError, match=message):
        resolve(parse_args(options))
