"""DBRX, case by case: gate, experts, their slices and files, router logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from models.registry import ConfigError, load_config
from router.placement import Placement
from router.step import Want
from shards.checkpoint import Checkpoint
from shards.loading import load_experts
from tests.models.driver import read_checkpoint, tokens_of
from tests.parity.battery import (
    assert_close,
    assert_every_way,
    assert_everywhere,
)
from tests.parity.cases import case
from tests.parity.checkpoints import spread, tensors_of
from tests.parity.executors import LocalRunner, pipeline
from tests.parity.remedies import edit_config, full_forward, load, logits_of
from tests.parity.session import Session, in_one_batch
from tests.tiny import write_tiny

SEQUENCES = [tokens_of(5, 26), tokens_of(6, 1), tokens_of(7, 8), tokens_of(8, 15)]
NUM_EXPERTS, WIDTH, HIDDEN = 4, 48, 64


def tiny_dbrx(folder: Path, **ffn: Any) -> Path:
    return write_tiny("dbrx", folder, n_layers=2, ffn_config=ffn)


@case(7, "DBRX", "the p-norm of the chosen weights, and none at all")
@pytest.mark.parametrize(
    "p",
    [
        pytest.param(None, id="null"),
        pytest.param(1.0, id="one"),
        pytest.param(2.0, id="two"),
        pytest.param(3.0, id="three"),
        pytest.param(0.0, id="zero counts them"),
    ],
)
def test_weight_norm(tmp_path: Path, rope_base_from_attn_config: Any, p: float | None) -> None:
    folder = tiny_dbrx(tmp_path, moe_normalize_expert_weights=p, moe_top_k=3)
    model = rope_base_from_attn_config(load(folder))
    assert_everywhere(folder, SEQUENCES, logits_of(model, SEQUENCES))


@case(8, "DBRX", "the p of the norm as an int, as the hub's files may have it")
@pytest.mark.parametrize("p", [pytest.param(1, id="one"), pytest.param(2, id="two")])
def test_weight_norm_as_int(
    tmp_path: Path, float_weight_norm: Any, rope_base_from_attn_config: Any, p: int
) -> None:
    folder = tiny_dbrx(tmp_path)
    edit_config(folder, ffn_config={"moe_normalize_expert_weights": p})
    model = rope_base_from_attn_config(float_weight_norm(folder))
    assert model.config.ffn_config.moe_normalize_expert_weights == p
    assert_everywhere(folder, SEQUENCES, logits_of(model, SEQUENCES))


@case(9, "DBRX", "one expert per token, all of them, and a single expert")
@pytest.mark.parametrize(
    "ffn",
    [
        pytest.param({"moe_top_k": 1}, id="one per token"),
        pytest.param({"moe_top_k": NUM_EXPERTS}, id="all"),
        pytest.param({"moe_num_experts": 1, "moe_top_k": 1}, id="single"),
        pytest.param(
            {"moe_top_k": 1, "moe_normalize_expert_weights": None}, id="one, not normalised"
        ),
    ],
)
def test_top_k(tmp_path: Path, rope_base_from_attn_config: Any, ffn: dict[str, Any]) -> None:
    folder = tiny_dbrx(tmp_path, **ffn)
    model = rope_base_from_attn_config(load(folder))
    assert_everywhere(folder, SEQUENCES, logits_of(model, SEQUENCES))


@case(9, "DBRX", "the weight of the only chosen expert is exactly 1")
def test_only_weight_is_one(tmp_path: Path) -> None:
    folder = tiny_dbrx(tmp_path, moe_top_k=1)
    before = in_one_batch(Session(LocalRunner(folder)), SEQUENCES)
    # Twice the gate's scores choose the same experts with another probability.
    with tensors_of(folder) as tensors:
        for name, tensor in tensors.items():
            if name.endswith("router.layer.weight"):
                tensor.mul_(2)
    after = in_one_batch(Session(LocalRunner(folder)), SEQUENCES)
    for mine, other in zip(before, after, strict=True):
        assert torch.equal(mine["logits"], other["logits"])


@case(10, "DBRX", "ffn_act_fn by name; further keys have no effect")
@pytest.mark.parametrize(
    "act",
    [
        pytest.param({"name": "relu"}, id="relu"),
        pytest.param({"name": "gelu"}, id="gelu"),
        pytest.param({"name": "gelu", "approximate": "tanh"}, id="gelu with a further key"),
        pytest.param({"name": "gelu_pytorch_tanh"}, id="gelu by tanh"),
        pytest.param(None, id="silu by default"),
    ],
)
def test_activation(
    tmp_path: Path, rope_base_from_attn_config: Any, act: dict[str, str] | None
) -> None:
    folder = tiny_dbrx(tmp_path, ffn_act_fn=act)
    edit_config(folder, ffn_config={"ffn_act_fn": act})
    model = rope_base_from_attn_config(load(folder))
    assert_everywhere(folder, SEQUENCES, logits_of(model, SEQUENCES))


@case(10, "DBRX", "an activation that is not served is refused")
def test_unknown_activation(tmp_path: Path) -> None:
    folder = tiny_dbrx(tmp_path)
    edit_config(folder, ffn_config={"ffn_act_fn": {"name": "geglu"}})
    with pytest.raises(
        ConfigError,
        match=r"ffn_config\.ffn_act_fn\.name is 'geglu', but must be one of silu,.*relu",
    ):
        load_config(folder)


@case(14, "DBRX", "a shard of experts 1 and 3 reads their rows alone and adds what they add")
def test_expert_slices(tmp_path: Path) -> None:
    folder = tiny_dbrx(tmp_path)
    config, checkpoint = load_config(folder), Checkpoint(folder)
    bank = load_experts(config, checkpoint, [1, 3], torch.float32)
    assert checkpoint.bytes_read == 2 * 3 * 2 * WIDTH * HIDDEN * 4  # layers, matrices, experts
    rows = torch.randn(7, HIDDEN, generator=torch.Generator().manual_seed(1))
    for layer_idx, block in enumerate(load(folder).transformer.blocks):
        outputs = bank.forward(layer_idx, [(1, 3), (3, 4)], rows)
        assert_close(outputs[:3], _expert(block, rows[:3], 1), "expert 1")
        assert_close(outputs[3:], _expert(block, rows[3:], 3), "expert 3")


@torch.no_grad()
def _expert(block: Any, rows: Tensor, expert: int) -> Tensor:
    """What Transformers' stacked experts make of rows that all go to one of them."""
    chosen = torch.full((len(rows), 1), expert)
    out: Tensor = block.ffn.experts(rows, chosen, torch.ones(len(rows), 1))
    return out.view(rows.shape)


@case(14, "DBRX", "shards of experts {1, 3}, {0} and {2} equal the whole model")
def test_expert_shards(tmp_path: Path, rope_base_from_attn_config: Any) -> None:
    folder = tiny_dbrx(tmp_path)
    packed = in_one_batch(Session(LocalRunner(folder)), SEQUENCES)
    expected = logits_of(rope_base_from_attn_config(load(folder)), SEQUENCES)
    for arrays, reference in zip(packed, expected, strict=True):
        assert_close(arrays["logits"], reference)
    placement = Placement(num_shards=3, shards=((1,), (0,), (2,), (0,)))
    assert placement.held_by(0) == (1, 3)
    with pipeline(folder, placement=placement) as runner:
        assert_every_way(Session(runner), SEQUENCES, packed)


@case(15, "DBRX", "w1, v1 and w2 of a layer in different files")
def test_matrices_in_different_files(tmp_path: Path, rope_base_from_attn_config: Any) -> None:
    folder = tiny_dbrx(tmp_path)
    expected = logits_of(rope_base_from_attn_config(load(folder)), SEQUENCES)

    def file_of(name: str) -> str:
        matrix = name.rsplit(".", 1)[-1]
        return f"{matrix if matrix in ('w1', 'v1', 'w2') else 'rest'}.safetensors"

    spread(folder, read_checkpoint(folder), file_of)
    assert len(list(folder.glob("*.safetensors"))) == 4
    assert_everywhere(folder, SEQUENCES, expected)


@case(16, "DBRX", "router logits [tokens, E] of every layer, raw")
def test_router_logits(tmp_path: Path, rope_base_from_attn_config: Any) -> None:
    folder = tiny_dbrx(tmp_path)
    model = rope_base_from_attn_config(load(folder))
    references = [full_forward(model, tokens, output_router_logits=True) for tokens in SEQUENCES]
    packed = assert_everywhere(
        folder,
        SEQUENCES,
        [reference.logits[0] for reference in references],
        want=Want(logits=True, router_logits=True),
    )
    for arrays, reference, tokens in zip(packed, references, SEQUENCES, strict=True):
        assert arrays.keys() == {"logits", "router_logits.0", "router_logits.1"}
        for layer_idx, expected in enumerate(reference.router_logits):
            actual = arrays[f"router_logits.{layer_idx}"]
            assert actual.shape == (len(tokens), NUM_EXPERTS)
            assert_close(actual, expected, f"layer {layer_idx}")


@case(16, "DBRX", "the aux loss is weighed by moe_loss_weight, not by router_aux_loss_coef")
@torch.no_grad()
def test_aux_loss_coef(tmp_path: Path) -> None:
    folder = tiny_dbrx(tmp_path, moe_loss_weight=0.07)
    edit_config(folder, router_aux_loss_coef=0.9)
    ids = torch.tensor([SEQUENCES[0]])
    model = load(folder)
    out = model(input_ids=ids, labels=ids, output_router_logits=True)
    added = out.loss - model(input_ids=ids, labels=ids, output_router_logits=False).loss
    assert load_config(folder).aux_loss_coef == pytest.approx(float(added / out.aux_loss), rel=1e-4)
