"""Whether a checkpoint holds exactly its model: every fault is named, in one line, at once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from models.registry import ConfigError
from shards.checkpoint import CheckpointError, open_model
from shards.verify import verify
from tests.layouts import fuse, read_tensors, split_dbrx_experts, write_tensors
from tests.tiny import FAMILIES, write_tiny

ROTARY = {
    "dbrx": "transformer.blocks.0.norm_attn_norm.attn.rotary_emb.inv_freq",
    "phimoe": "model.layers.0.self_attn.rotary_emb.inv_freq",
}


def fault(folder: Path) -> str:
    """What `verify` says of a folder."""
    config, checkpoint = open_model(folder)
    with pytest.raises(CheckpointError) as error:
        verify(config, checkpoint)
    assert checkpoint.bytes_read == 0
    assert "\n" not in str(error.value)
    return str(error.value).removeprefix(f"{folder}: ")


def edit_config(folder: Path, **keys: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **keys}))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_fault_is_named(family: str, tmp_path: Path) -> None:
    folder = write_tiny(family, tmp_path)
    verify(*open_model(folder))
    tensors = read_tensors(folder)
    missing, misshapen, mistyped, *_ = sorted(tensors)
    del tensors[missing]
    shape = list(tensors[misshapen].shape)
    tensors[misshapen] = torch.zeros(1, *shape)
    tensors[mistyped] = tensors[mistyped].int()
    tensors["model.stranger"] = torch.zeros(3)
    if family in ROTARY:  # an old conversion's buffer, known to be redundant
        tensors[ROTARY[family]] = torch.zeros(8)
    write_tensors(folder, tensors)
    lost, surplus, shapes, dtypes = fault(folder).split("; ", 3)
    assert lost.startswith("missing tensors: ")
    assert missing in lost
    assert surplus == "unexpected tensors: model.stranger"
    assert shapes == f"tensors of a wrong shape: {misshapen} is {[1, *shape]}, not {shape}"
    assert dtypes.startswith(f"tensors of a wrong dtype: {mistyped} has dtype I32; allowed: F64")


def test_many_faults_of_a_kind_are_counted(tmp_path: Path) -> None:
    folder = write_tiny("jamba", tmp_path)
    tensors = read_tensors(folder)
    write_tensors(folder, {f"other.{name}": tensor for name, tensor in tensors.items()})
    lost, surplus = fault(folder).split("; ")
    num_others = len(tensors) - 20
    assert lost.count(",") == surplus.count(",") == 19
    assert lost.endswith(f" and {num_others} more")
    assert surplus.endswith(f" and {num_others} more")


@pytest.mark.parametrize("rows", [-1, 1])
def test_stacked_experts_have_neither_more_nor_fewer_rows(rows: int, tmp_path: Path) -> None:
    folder = write_tiny("dbrx", tmp_path)
    tensors = read_tensors(folder)
    name = "transformer.blocks.1.ffn.experts.mlp.w2"
    tensors[name] = torch.zeros(192 + rows, 64)
    write_tensors(folder, tensors)
    found = f"tensors of a wrong shape: {name} is [{192 + rows}, 64], not [192, 64]"
    assert fault(folder) == found


@pytest.mark.parametrize(
    ("family", "keys"),
    [
        ("jamba", {"num_hidden_layers": 10_000_000}),
        ("jamba", {"num_experts": 10_000_000, "num_experts_per_tok": 2}),
        ("phimoe", {"num_hidden_layers": 10_000_000}),
        ("phimoe", {"num_local_experts": 10_000_000}),
        ("dbrx", {"n_layers": 10_000_000}),
        ("dbrx", {"ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 10_000_000}}),
        ("dbrx", {"d_model": 4 * 10**9}),
        ("jamba", {"vocab_size": 10**12, "mamba_expand": 10**6}),
    ],
)
def test_absurd_sizes_end_the_search_early(
    family: str, keys: dict[str, Any], tmp_path: Path
) -> None:
    folder = write_tiny(family, tmp_path)
    edit_config(folder, **keys)
    said = fault(folder)  # would take minutes and all memory, if it looked for everything
    assert len(said) < 10_000
    if "n_layers" in keys or "num_hidden_layers" in keys:
        assert " and at least " in said


@pytest.mark.parametrize("classifier", [False, True])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", ["phimoe", "jamba"])
def test_every_layout_is_complete(
    family: str, tied: bool, classifier: bool, tmp_path: Path
) -> None:
    folder = write_tiny(family, tmp_path, tie_word_embeddings=tied, classifier=classifier)
    verify(*open_model(folder))
    if not classifier:
        fuse(folder)
        verify(*open_model(folder))


def test_dbrx_experts_may_be_split_but_not_both_ways(tmp_path: Path) -> None:
    folder = write_tiny("dbrx", tmp_path)
    stacked = read_tensors(folder)
    split_dbrx_experts(folder)
    verify(*open_model(folder))
    name = "transformer.blocks.0.ffn.experts.mlp.w1"
    write_tensors(folder, {**read_tensors(folder), name: stacked[name]})
    assert fault(folder).startswith(
        "unexpected tensors: transformer.blocks.0.ffn.experts.0.w1.weight, "
    )


def test_an_untied_model_needs_its_head(tmp_path: Path) -> None:
    folder = write_tiny("jamba", tmp_path)
    tensors = read_tensors(folder)
    del tensors["lm_head.weight"]
    write_tensors(folder, tensors)
    assert fault(folder) == "missing tensors: lm_head.weight"


def test_heads_must_be_whole(tmp_path: Path) -> None:
    folder = write_tiny("phimoe", tmp_path, classifier=True, num_labels=3)
    tensors = read_tensors(folder)
    write_tensors(folder, {**tensors, "score.bias": torch.zeros(3)})
    assert fault(folder) == "unexpected tensors: score.bias"
    write_tensors(folder, tensors)
    edit_config(folder, score_bias=True)
    assert fault(folder) == "missing tensors: score.bias"
    edit_config(folder, score_bias=False, id2label=None)
    assert fault(folder) == "tensors of a wrong shape: score.weight is [3, 64], not [2, 64]"


def test_dbrx_with_a_classification_head_is_refused(tmp_path: Path) -> None:
    folder = write_tiny("dbrx", tmp_path)
    write_tensors(folder, {**read_tensors(folder), "score.weight": torch.zeros(2, 64)})
    with pytest.raises(ConfigError, match=r"score\.weight: DBRX has no classification head"):
        open_model(folder)


def test_an_index_says_where_tensors_are_not_how_large(tmp_path: Path) -> None:
    folder = write_tiny("phimoe", tmp_path, max_shard_size="60KB")
    index = folder / "model.safetensors.index.json"
    raw = json.loads(index.read_text())
    assert len(set(raw["weight_map"].values())) > 1
    index.write_text(json.dumps({**raw, "metadata": {"total_size": 1}}))
    verify(*open_model(folder))
