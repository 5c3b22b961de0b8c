"""PhiMoE's checkpoints: the hub's names, Transformers 5's fused ones, and heads tied or not."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from deploy.config import ConfigError, parse_args
from deploy.quantize import quantize_model
from deploy.resolve import resolve
from shards.checkpoint import Checkpoint
from tests.models.driver import read_checkpoint, tokens_of
from tests.models.oracle import write_checkpoint
from tests.parity.battery import (
    Arrays,
    assert_close,
    assert_everywhere,
    assert_same_bits,
    assert_visible,
)
from tests.parity.cases import case
from tests.parity.checkpoints import spread, tensors_of
from tests.parity.executors import LocalRunner
from tests.parity.remedies import drop_keys, edit_config, load, logits_of
from tests.parity.session import Session, in_one_batch
from tests.tiny import write_tiny

SEQUENCES = [tokens_of(1, 24), tokens_of(2, 1), tokens_of(3, 9)]
NUM_LAYERS, NUM_EXPERTS = 2, 4

WB = ("weight", "bias")
# The names in Microsoft's own files.
HUB_NAMES = {
    "model.embed_tokens.weight",
    "model.norm.weight",
    "model.norm.bias",
    "lm_head.weight",
    "lm_head.bias",
    *(
        f"model.layers.{layer}.{name}"
        for layer in range(NUM_LAYERS)
        for name in (
            *(f"{n}.{p}" for n in ("input_layernorm", "post_attention_layernorm") for p in WB),
            *(f"self_attn.{n}_proj.{p}" for n in "qkvo" for p in WB),
            "block_sparse_moe.gate.weight",
            *(
                f"block_sparse_moe.experts.{expert}.w{n}.weight"
                for expert in range(NUM_EXPERTS)
                for n in (1, 2, 3)
            ),
        )
    ),
}


def tiny(folder: Path, **overrides: Any) -> Path:
    return write_tiny("phimoe", folder, num_hidden_layers=NUM_LAYERS, **overrides)


def fused(tensors: dict[str, Tensor], layers: range) -> dict[str, Tensor]:
    """The same with some layers' experts named and stacked as Transformers 5 does in memory."""
    result = dict(tensors)
    for layer in layers:
        hub, own = f"model.layers.{layer}.block_sparse_moe.", f"model.layers.{layer}.mlp."
        result[f"{own}router.weight"] = result.pop(f"{hub}gate.weight")
        w1, w2, w3 = (
            torch.stack([result.pop(f"{hub}experts.{e}.{n}.weight") for e in range(NUM_EXPERTS)])
            for n in ("w1", "w2", "w3")
        )
        result[f"{own}experts.gate_up_proj"] = torch.cat([w1, w3], dim=1)
        result[f"{own}experts.down_proj"] = w2
    return result


def served(folder: Path) -> list[Arrays]:
    """What the local executor makes of all sequences."""
    return in_one_batch(Session(LocalRunner(folder)), SEQUENCES)


@case(37, "PhiMoE", "fused Transformers 5 names in one file and in several: the hub names' bits")
@pytest.mark.parametrize("num_files", [1, 3], ids=["one file", "sharded"])
def test_fused_names(tmp_path: Path, num_files: int) -> None:
    folder = tiny(tmp_path)
    hub = served(folder)
    tensors = fused(read_checkpoint(folder), range(NUM_LAYERS))
    if num_files == 1:
        write_checkpoint(folder, tensors)
    else:
        order = sorted(tensors)
        spread(folder, tensors, lambda name: f"part-{order.index(name) % num_files}.safetensors")
    found = assert_everywhere(folder, SEQUENCES, logits_of(load(folder), SEQUENCES))
    for mine, expected in zip(found, hub, strict=True):
        assert_same_bits(mine, expected, "fused names")


@case(37, "PhiMoE", "some layers under hub names, others fused")
def test_mixed_names(tmp_path: Path) -> None:
    folder = tiny(tmp_path)
    expected = logits_of(load(folder), SEQUENCES)
    write_checkpoint(folder, fused(read_checkpoint(folder), range(1, NUM_LAYERS)))
    assert_everywhere(folder, SEQUENCES, expected)


@case(37, "PhiMoE", "hub names in several files; both spellings of the architecture, and none")
@pytest.mark.parametrize(
    "architectures",
    [["PhiMoEForCausalLM"], ["PhimoeForCausalLM"], None],
    ids=["the hub", "Transformers", "none"],
)
def test_hub_names(tmp_path: Path, architectures: list[str] | None) -> None:
    folder = tiny(tmp_path, max_shard_size="60KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    assert set(read_checkpoint(folder)) == HUB_NAMES
    expected = logits_of(load(folder), SEQUENCES)
    drop_keys(folder, "architectures")
    if architectures:
        edit_config(
            folder,
            architectures=architectures,
            auto_map={"AutoModelForCausalLM": "modeling_phimoe.PhiMoEForCausalLM"},
        )
    assert_everywhere(folder, SEQUENCES, expected)


@case(37, "PhiMoE", "what is written (quantised) from fused names has the hub's names")
def test_written_names(tmp_path: Path) -> None:
    folder = tiny(tmp_path / "fused")
    write_checkpoint(folder, fused(read_checkpoint(folder), range(NUM_LAYERS)))
    assert quantize_model(str(folder), tmp_path / "int8", "int8") == 0
    names = Checkpoint(tmp_path / "int8").names
    assert {name for name in names if not re.search("scale", name)} == HUB_NAMES


@case(37, "PhiMoE", "one parameter under both names, or under half of one, is refused by name")
@pytest.mark.parametrize(
    ("lost", "added", "message"),
    [
        pytest.param(
            "model.layers.1.mlp.experts.down_proj",
            None,
            r"missing tensors: .*model\.layers\.1\.block_sparse_moe\.experts\.0\.w2\.weight or "
            r"model\.layers\.1\.mlp\.experts\.down_proj",
            id="half is missing",
        ),
        pytest.param(
            None,
            "model.layers.0.block_sparse_moe.gate.weight",
            r"unexpected tensors: model\.layers\.0\.mlp\.router\.weight",
            id="both names",
        ),
    ],
)
def test_refused_names(tmp_path: Path, lost: str | None, added: str | None, message: str) -> None:
    folder = tiny(tmp_path)
    hub = read_checkpoint(folder)
    tensors = fused(hub, range(NUM_LAYERS))
    if lost:
        del tensors[lost]
    if added:
        tensors[added] = hub[added].clone()
    write_checkpoint(folder, tensors)
    with pytest.raises(ConfigError, match=message):
        resolve(parse_args({"model": str(folder)}))


@case(
    30, "PhiMoE", "a tied head and its file: absent, identical, different (the file's own counts)"
)
@pytest.mark.parametrize("head", ["absent", "identical", "different"])
def test_tied_head(tmp_path: Path, head: str) -> None:
    folder = tiny(tmp_path, tie_word_embeddings=True)
    tied = logits_of(load(folder), SEQUENCES)
    with tensors_of(folder) as tensors:
        assert "lm_head.weight" not in tensors
        table = tensors["model.embed_tokens.weight"]
        if head != "absent":
            tensors["lm_head.weight"] = table.clone() if head == "identical" else table.flip(0)
    expected = logits_of(load(folder), SEQUENCES)
    if head == "different":
        assert_visible(expected[0], tied[0])
    else:
        assert_close(expected[0], tied[0])
    assert_everywhere(folder, SEQUENCES, expected)


@case(30, "PhiMoE", "biases that the flags deny, or promise in vain, are named")
@pytest.mark.parametrize(
    ("flag", "name"),
    [
        ("lm_head_bias", "lm_head.bias"),
        ("attention_bias", "model.layers.0.self_attn.o_proj.bias"),
    ],
)
def test_biases_and_flags(tmp_path: Path, flag: str, name: str) -> None:
    with_bias, without = tiny(tmp_path / "with"), tiny(tmp_path / "without", **{flag: False})
    edit_config(with_bias, **{flag: False})
    edit_config(without, **{flag: True})
    for folder, problem in ((with_bias, "unexpected"), (without, "missing")):
        with pytest.raises(ConfigError, match=rf"{problem} tensors: [^;]*{re.escape(name)}"):
            resolve(parse_args({"model": str(folder)}))


@case(30, "PhiMoE", "an untied model whose file holds no head is refused")
def test_untied_without_head(tmp_path: Path) -> None:
    folder = tiny(tmp_path, tie_word_embeddings=True)
    edit_config(folder, tie_word_embeddings=False)
    with pytest.raises(ConfigError, match=r"missing tensors: lm_head\.weight"):
        resolve(parse_args({"model": str(folder)}))
