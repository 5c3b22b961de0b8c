"""Jamba's Mamba mixer and its attention: shapes, biases, norms, and what is stored how."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.models.driver import read_checkpoint, tokens_of
from tests.models.oracle import write_checkpoint
from tests.parity.battery import assert_everywhere
from tests.parity.cases import case
from tests.parity.jamba import (
    CROSSED,
    RECURRENT,
    SEQUENCES,
    SHORT,
    assert_parity,
    jamba,
    reference,
    same_bits_everywhere,
)
from tests.parity.remedies import edit_config, load

TOKENS = tokens_of(5, 6)


@case(45, "Jamba", "biases of convolution and projections, with and without")
@pytest.mark.parametrize("conv_bias", [False, True], ids=["no conv bias", "conv bias"])
@pytest.mark.parametrize("proj_bias", [False, True], ids=["no proj bias", "proj bias"])
def test_biases(tmp_path: Path, conv_bias: bool, proj_bias: bool) -> None:
    folder = jamba(tmp_path, **SHORT, mamba_conv_bias=conv_bias, mamba_proj_bias=proj_bias)
    biases = {name for name in read_checkpoint(folder) if name.endswith(".bias")}
    expected = {"dt_proj"} | ({"conv1d"} if conv_bias else set())
    expected |= {"in_proj", "out_proj"} if proj_bias else set()
    assert biases == {f"model.layers.0.mamba.{name}.bias" for name in expected}
    assert_parity(folder)


@case(45, "Jamba", "biases of convolution and projections, with and without")
def test_transformers_padding_leaks_through_a_projection_bias(
    tmp_path: Path, full_forward: Any
) -> None:
    """Why the reference is never padded: pads are zeroed before in_proj, which adds its bias."""
    model = load(jamba(tmp_path, **SHORT, mamba_proj_bias=True))
    alone = full_forward(model, TOKENS).logits[0]
    mask = torch.tensor([[0, 0, 0, *[1] * len(TOKENS)]])
    padded = full_forward(model, [0, 0, 0, *TOKENS], attention_mask=mask).logits[0, 3:]
    assert (padded - alone).abs().max() > 0.01


@case(46, "Jamba", 'mamba_dt_rank: explicit, or "auto", which rounds hidden_size / 16 up')
@pytest.mark.parametrize(
    ("hidden", "written", "rank"),
    [
        pytest.param(64, 3, 3, id="explicit"),
        pytest.param(64, 7, 7, id="explicit, above hidden size over 16"),
        pytest.param(64, "auto", 4, id="auto divides"),
        pytest.param(72, "auto", 5, id="auto rounds up"),
    ],
)
def test_dt_rank(tmp_path: Path, hidden: int, written: object, rank: int) -> None:
    folder = jamba(tmp_path, **SHORT, hidden_size=hidden, mamba_dt_rank=written)
    edit_config(folder, mamba_dt_rank=written)  # Transformers saves what "auto" came to
    assert read_checkpoint(folder)["model.layers.0.mamba.dt_proj.weight"].shape[1] == rank
    assert_parity(folder)


SHAPES: dict[str, dict[str, int]] = {
    "kernel 1": {"mamba_d_conv": 1},
    "kernel 2, state 8": {"mamba_d_conv": 2, "mamba_d_state": 8},
    "kernel 4, state 64": {"mamba_d_conv": 4, "mamba_d_state": 64},
    "kernel 7, odd state": {"mamba_d_conv": 7, "mamba_d_state": 5},
    "expand 1": {"mamba_expand": 1},
    "expand 3": {"mamba_expand": 3},
}


@case(47, "Jamba", "mamba_d_conv 1 to 7, mamba_d_state 5 to 64, mamba_expand 1 and 3")
@pytest.mark.parametrize("keys", SHAPES.values(), ids=SHAPES.keys())
def test_shapes(tmp_path: Path, keys: dict[str, int]) -> None:
    """FFN and mixer widths differ, so that one cannot stand in for the other."""
    assert_parity(jamba(tmp_path, **CROSSED, **keys))


HEADS: dict[str, dict[str, int]] = {
    "one kv head": {"num_key_value_heads": 1},
    "four query heads to a kv head": {"num_attention_heads": 8, "num_key_value_heads": 2},
    "a kv head to each": {"num_key_value_heads": 4},
}


@case(53, "Jamba", "kv heads: one, a quarter, all; null means all")
@pytest.mark.parametrize("keys", HEADS.values(), ids=HEADS.keys())
def test_kv_heads(tmp_path: Path, keys: dict[str, int]) -> None:
    assert_parity(jamba(tmp_path, **SHORT, **keys))


@case(53, "Jamba", "kv heads: one, a quarter, all; null means all")
def test_null_kv_heads(tmp_path: Path) -> None:
    """AI21's own code and the documentation say so; Transformers 5 only takes the number."""
    folder = jamba(tmp_path, **SHORT, num_key_value_heads=4)
    expected = reference(folder)
    edit_config(folder, num_key_value_heads=None)
    assert_everywhere(folder, SEQUENCES, expected)


@case(54, "Jamba", "norms of dt, B and C, away from one; their eps is rms_norm_eps")
@pytest.mark.parametrize("eps", [0.1, 1e-6], ids=["large eps", "small eps"])
def test_inner_norms(tmp_path: Path, eps: float) -> None:
    folder = jamba(tmp_path, **RECURRENT, rms_norm_eps=eps)
    tensors = read_checkpoint(folder)
    for name, tensor in tensors.items():
        if name.endswith(("dt_layernorm.weight", "b_layernorm.weight", "c_layernorm.weight")):
            tensor.mul_(1.5)
    write_checkpoint(folder, tensors)
    assert_parity(folder)


STORED = {
    "only A_log in bfloat16": ("A_log", torch.bfloat16),
    "all in bfloat16": ("", torch.bfloat16),
    "all in float16": ("", torch.float16),
}


@case(55, "Jamba", "A_log and D as random values, stored in 16 bits, computed in float32")
@pytest.mark.parametrize(("suffix", "dtype"), STORED.values(), ids=STORED.keys())
def test_sixteen_bit_files(tmp_path: Path, suffix: str, dtype: torch.dtype) -> None:
    folder = jamba(tmp_path, **RECURRENT)
    tensors = read_checkpoint(folder)
    halved = {n: t.to(dtype) if n.endswith(suffix) else t for n, t in tensors.items()}
    write_checkpoint(folder, halved)
    assert_parity(folder)


@case(55, "Jamba", "A = -exp(A_log) is float32 in a bfloat16 model too")
def test_a_is_not_rounded_to_bfloat16(tmp_path: Path) -> None:
    """Two stored A_log whose exponentials are one number in bfloat16 give two models."""
    values = torch.arange(128, 256).to(torch.bfloat16) / 512
    alike = (values.exp().diff() == 0).nonzero().flatten()
    assert (values.float().exp().diff()[alike] > 0).all()
    folder = jamba(tmp_path, **RECURRENT)
    tensors = {n: t.to(torch.bfloat16) for n, t in read_checkpoint(folder).items()}
    logits = []
    for step in (0, 1):
        generator = torch.Generator().manual_seed(3)
        for name, tensor in tensors.items():
            if name.endswith("A_log"):
                chosen = torch.randint(len(alike), tensor.shape, generator=generator)
                tensors[name] = values[alike[chosen] + step]
        write_checkpoint(folder, tensors)
        logits.append(torch.cat(same_bits_everywhere(folder, SEQUENCES, dtype="bfloat16")))
    assert (logits[0] != logits[1]).float().mean() > 0.1
