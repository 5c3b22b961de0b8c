"""Weight-only int8: what it changes, by how much, and what it leaves alone."""

from __future__ import annotations

import asyncio
import re
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.quantization import all_logits, kl_per_token, load_dialogues
from models.interface import TensorSlice
from models.layers.rowwise import linear, row_tile
from models.layers.stage import Stage
from models.quantization_config import effective_quantization
from models.registry import ConfigError, load_config, parse_config
from router.step import SamplingParams
from shards.checkpoint import Checkpoint, CheckpointError
from shards.loading import load_experts, load_stage
from shards.quantization import quantize_rows
from tests.groups import ask_all, running_group
from tests.shards.int8_oracle import output_dim, spread_channels, write_round_trip
from tests.tiny import FAMILIES, VOCAB_SIZE, load_reference, reference_logits, write_tiny

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INT8 = ("int8", "int8-all")
PROMPTS = [tuple((7 * i + j) % VOCAB_SIZE for j in range(3 + 4 * i)) for i in range(4)]


def randn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_each_channel_is_within_half_a_step(dtype: torch.dtype) -> None:
    matrix = (randn(0, 37, 50) * torch.logspace(-4, 2, 37)[:, None]).to(dtype)
    matrix[5] = 0
    values, scale = quantize_rows(matrix)
    assert values.dtype is torch.int8
    assert scale.dtype is torch.float32
    exact, largest = matrix.double(), matrix.double().abs().amax(1)
    torch.testing.assert_close(scale.double() * 127, largest, rtol=1e-6, atol=0)
    error = (values.double() * scale.double()[:, None] - exact).abs().amax(1)
    assert (error <= largest / 254 * (1 + 1e-4)).all()
    assert values[5].eq(0).all()
    assert values.int().abs().amax(1)[largest > 0].eq(127).all()


def test_chunks_do_not_change_values(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = randn(1, 33, 40)
    whole = quantize_rows(matrix)
    monkeypatch.setattr("shards.quantization._CHUNK_ELEMENTS", 100)
    assert all(torch.equal(a, b) for a, b in zip(whole, quantize_rows(matrix), strict=True))


# The widest of them are more than one block of every dtype.
@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.sampled_from(DTYPES),
    st.sampled_from([1, 2, 5]),
    st.sampled_from([(1, 3), (3, 16), (64, 97), (48, 300), (1037, 1024), (700, 401)]),
    st.integers(0, 1 << 30),
)
def test_product(dtype: torch.dtype, tiles: int, shape: tuple[int, int], seed: int) -> None:
    tile = row_tile(dtype)
    x, bias = randn(seed, tiles * tile, shape[1]).to(dtype), randn(seed + 2, shape[0]).to(dtype)
    values, scale = quantize_rows(20 * randn(seed + 1, *shape))
    full = linear(x, values, bias, scale)
    assert full.dtype is dtype
    weight = values.double() * scale.double()[:, None]
    expected = x.double() @ weight.T + bias.double()
    error = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]
    size = 20 * shape[1] ** 0.5
    torch.testing.assert_close(full.double(), expected, atol=error * size, rtol=error)
    row, at = seed % x.shape[0], seed % tile
    alone = x.new_zeros(tile, shape[1])
    alone[at] = x[row]
    assert torch.equal(linear(alone, values, bias, scale)[at], full[row])
    order = torch.randperm(x.shape[0], generator=torch.Generator().manual_seed(seed))
    assert torch.equal(linear(x[order], values, bias, scale), full[order])


@pytest.mark.parametrize("quantization", INT8)
@pytest.mark.parametrize("family", FAMILIES)
async def test_logits_are_transformers_with_the_rounded_weights(
    family: str, quantization: str, tmp_path: Path
) -> None:
    folder = write_tiny(family, tmp_path / "full")
    spread_channels(folder)
    oracle = load_reference(write_round_trip(folder, tmp_path / "rounded", quantization))
    # Channels of very different size cost any float32 model 6e-5, Transformers' own included.
    oracle = oracle.double()
    oracle.config._experts_implementation = "eager"  # its grouped product refuses float64
    with running_group(folder, quantization=quantization) as group:
        served = await all_logits(group, PROMPTS)
    for prompt, logits in zip(PROMPTS, served, strict=True):
        expected = reference_logits(oracle, prompt).numpy()
        np.testing.assert_allclose(logits, expected, atol=5e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("family", "dispatch"), [("dbrx", "actor"), ("phimoe", "direct"), ("jamba", "actor")]
)
def test_bits_do_not_depend_on_the_topology(family: str, dispatch: str, tmp_path: Path) -> None:
    folder = write_tiny(family, tmp_path)
    sampling = SamplingParams(max_tokens=9, temperature=0.0, logprobs=0)
    topologies: tuple[dict[str, Any], ...] = (
        {"executor": "local"},
        {"stages": 2, "expert_shards": 3, "dispatch": dispatch, "max_num_batched_tokens": 16},
    )
    answers = []
    for options in topologies:
        with running_group(folder, quantization="int8-all", **options) as group:
            together = asyncio.run(ask_all(group, PROMPTS, sampling))
            assert together[1] == asyncio.run(ask_all(group, PROMPTS[1:2], sampling))[0]
            answers.append(together)
    assert answers[0] == answers[1]


@pytest.mark.parametrize("quantization", ["none", *INT8])
@pytest.mark.parametrize("family", FAMILIES)
def test_only_experts_or_attention_and_dense_linears_are_int8(
    family: str, quantization: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_tiny(family, tmp_path)
    config, on_disk = load_config(folder), load_file(folder / "model.safetensors")
    loaded: dict[str, Tensor] = {}
    monkeypatch.setattr(Stage, "load", lambda self, weights: loaded.update(weights))
    stage = load_stage(
        config, Checkpoint(folder), 0, config.num_layers, torch.float32, quantization=quantization
    )
    num_int8 = 0
    for name, wanted in stage.tensors().items():
        hub_names = [leaf.sources[0].name for leaf in wanted.leaves]
        should = any(output_dim(hub, quantization) is not None for hub in hub_names)
        assert (loaded[name].dtype is torch.int8) == should == (f"{name}_scale" in loaded), name
        num_int8 += should
        if not should:
            assert torch.equal(loaded[name], torch.cat([on_disk[hub] for hub in hub_names])), name
    # Two per attention layer, three per dense FFN, none in a Mamba mixer.
    expected = {"dbrx": 2 * 3, "phimoe": 2 * 3, "jamba": 2 * 1 + 3 * 2}[family]
    assert num_int8 == (expected if quantization == "int8-all" else 0)


def test_an_int8_bank_takes_half_the_memory_of_bfloat16(tmp_path: Path) -> None:
    folder = write_tiny("phimoe", tmp_path)
    config, checkpoint = load_config(folder), Checkpoint(folder)
    every = range(config.num_experts)
    half = load_experts(config, checkpoint, every, torch.bfloat16)
    int8 = load_experts(config, checkpoint, every, torch.bfloat16, quantization="int8")
    channels = 3 * config.num_experts * (48 + 48 + 64)
    assert int8.num_bytes == half.num_bytes // 2 + 4 * channels
    int8.forward(0, [(1, 5)], torch.ones(5, 64, dtype=torch.bfloat16))
    assert int8.num_bytes == half.num_bytes // 2 + 4 * channels


@pytest.mark.parametrize("family", FAMILIES)
def test_one_tensor_at_a_time_is_in_full_precision(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_tiny(family, tmp_path)
    config, checkpoint, read = load_config(folder), Checkpoint(folder), Checkpoint.read
    alive: list[weakref.ref[Tensor]] = []

    def watched(self: Checkpoint, wanted: TensorSlice, dtype: torch.dtype, *rest: Any) -> Tensor:
        assert sum(matrix() is not None for matrix in alive) <= 1
        tensor = read(self, wanted, dtype, *rest)
        alive.append(weakref.ref(tensor))
        return tensor

    monkeypatch.setattr(Checkpoint, "read", watched)
    every = range(config.num_experts)
    load_experts(config, checkpoint, every, torch.bfloat16, quantization="int8")
    moe_layers = sum(config.is_moe_layer(layer) for layer in range(config.num_layers))
    assert len(alive) == 3 * config.num_experts * moe_layers


async def test_drift_on_a_trained_model_is_small() -> None:
    # Measured: 6.6e-4 nats per token. One scale per matrix gives 2e-3, and scales of `down` along
    # its inputs 6e-2.
    dialogues = load_dialogues("nano-dbrx", 9)
    logits = {}
    for quantization in ("none", *INT8):
        with running_group("nano-dbrx", quantization=quantization) as group:
            logits[quantization] = await all_logits(group, dialogues.answered)
    means = {
        quantization: np.concatenate(
            [kl_per_token(*pair) for pair in zip(logits["none"], served, strict=True)]
        ).mean()
        for quantization, served in logits.items()
    }
    assert means["none"] == 0.0
    assert 0.0 < means["int8"] < 1.5e-3
    assert means["int8"] < means["int8-all"] < 5e-2


def test_values_that_are_not_finite_are_refused_by_name(tmp_path: Path) -> None:
    folder = write_tiny("phimoe", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.block_sparse_moe.experts.2.w2.weight"
    tensors[name][3, 4] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config, checkpoint = load_config(folder), Checkpoint(folder)
    load_experts(config, checkpoint, (1,), torch.float32, quantization="int8")
    with pytest.raises(CheckpointError, match=rf"{re.escape(name)}: a value is not finite"):
        load_experts(config, checkpoint, (2,), torch.float32, quantization="int8")


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "fp8", "compressed-tensors"])
@pytest.mark.parametrize("architecture", ["Dbrx", "PhiMoE", "Jamba"])
def test_other_methods_are_refused_by_name(method: str, architecture: str) -> None:
    raw = {
        "architectures": [f"{architecture}ForCausalLM"],
        "quantization_config": {"quant_method": method, "bits": 8},
    }
    with pytest.raises(
        ConfigError, match=rf"quantization_config\.quant_method is '{method}'.*conc"
    ):
        parse_config(raw)


@pytest.mark.parametrize(
    ("stored", "key"),
    [
        ({"load_in_8bit": True}, "quant_method is not given"),
        ({"quant_method": "conclave"}, "quantization is not given"),
        ({"quant_method": "conclave", "quantization": "none"}, "quantization is 'none'"),
        ([], "quantization_config is \\[\\]"),
    ],
)
def test_incomplete_marks_are_refused_by_name(stored: object, key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        parse_config({"architectures": ["DbrxForCausalLM"], "quantization_config": stored})


def test_what_is_served() -> None:
    raw: dict[str, Any] = {"architectures": ["JambaForCausalLM"]}
    plain = parse_config(raw)
    dense = parse_config({**raw, "num_experts": 1, "num_experts_per_tok": 1})
    mark = {"quant_method": "conclave", "quantization": "int8"}
    marked = parse_config({**raw, "quantization_config": mark})
    assert [effective_quantization(q, plain) for q in ("none", *INT8)] == ["none", *INT8]
    assert [effective_quantization(q, marked) for q in ("none", "int8")] == ["int8", "int8"]
    assert effective_quantization("int8-all", dense) == "int8-all"
    with pytest.raises(ValueError, match=r"quantization=int8-all: .*values are none, int8$"):
        effective_quantization("int8-all", marked)
    with pytest.raises(ValueError, match=r"quantization=int8: no layer .*none, int8-all$"):
        effective_quantization("int8", dense)
