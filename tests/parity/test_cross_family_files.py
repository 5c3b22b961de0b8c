"""All families: sharded files there and back, and files that do not hold the model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from shards.checkpoint import Checkpoint, CheckpointError, open_model
from shards.checkpoint_writer import PlannedTensor, write_checkpoint
from shards.verify import verify
from tests.models.driver import read_checkpoint, tokens_of
from tests.models.oracle import tiny
from tests.parity.battery import assert_everywhere
from tests.parity.cases import case
from tests.parity.checkpoints import INDEX, spread
from tests.parity.executors import LocalRunner
from tests.parity.remedies import full_forward, load, logits_of
from tests.tiny import FAMILIES

SEQUENCES = [tokens_of(31, 23), tokens_of(32, 1), tokens_of(33, 7)]

each_family = pytest.mark.parametrize("family", FAMILIES)


@case(65, "all", "a sharded checkpoint with an index, loaded and saved again by Transformers")
@each_family
def test_sharded_by_transformers(tmp_path: Path, corrected: Any, family: str) -> None:
    single, sharded = tmp_path / "single", tmp_path / "sharded"
    expected = logits_of(corrected(tiny(family, single)), SEQUENCES)
    load(single).save_pretrained(sharded, max_shard_size="40KB")
    assert len(set(_weight_map(sharded).values())) > 3
    assert_everywhere(sharded, SEQUENCES, expected)


@case(65, "all", "a sharded checkpoint with an index, written here and loaded by Transformers")
@each_family
def test_sharded_by_us(tmp_path: Path, family: str) -> None:
    folder = tiny(family, tmp_path)
    before = full_forward(load(folder), SEQUENCES[0]).logits
    tensors = read_checkpoint(folder)
    (folder / "model.safetensors").unlink()
    planned = [_planned(name, tensor) for name, tensor in tensors.items()]
    write_checkpoint(folder, planned, max_shard_bytes=40_000, on_written=lambda _: None)
    assert len(set(_weight_map(folder).values())) > 3
    model, loading = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(loading.values()), loading
    assert torch.equal(full_forward(model.eval(), SEQUENCES[0]).logits, before)


def _planned(name: str, tensor: Tensor) -> PlannedTensor:
    """Written in two pieces where it has two rows."""
    pieces = [piece.contiguous() for piece in tensor.chunk(2)]
    return PlannedTensor(
        name=name, dtype=tensor.dtype, shape=tuple(tensor.shape), pieces=lambda: pieces
    )


def _weight_map(folder: Path) -> dict[str, str]:
    found: dict[str, str] = json.loads((folder / INDEX).read_text())["weight_map"]
    return found


# One tensor of each kind, as the hub spells them.
EXPERT = {
    "dbrx": "transformer.blocks.1.ffn.experts.mlp.v1",
    "phimoe": "model.layers.1.block_sparse_moe.experts.2.w3.weight",
    "jamba": "model.layers.1.feed_forward.experts.2.up_proj.weight",
}
NORM = {
    "dbrx": "transformer.blocks.2.norm_attn_norm.norm_2.weight",
    "phimoe": "model.layers.2.post_attention_layernorm.bias",
    "jamba": "model.layers.0.mamba.b_layernorm.weight",
}
GATE = {
    "dbrx": "transformer.blocks.0.ffn.router.layer.weight",
    "phimoe": "model.layers.0.block_sparse_moe.gate.weight",
    "jamba": "model.layers.3.feed_forward.router.weight",
}

Break = Callable[[dict[str, Tensor]], None]


def broken(folder: Path, family: str, change: Break) -> Path:
    """A checkpoint in three files whose index agrees with them, after a change."""
    tiny(family, folder)
    tensors = read_checkpoint(folder)
    change(tensors)
    spread(folder, tensors, lambda name: f"part-{len(name) % 3}.safetensors")
    return folder


def problem(folder: Path) -> str:
    """What `verify` says, which is also what stops a model from being loaded."""
    with pytest.raises(CheckpointError) as refused:
        verify(*open_model(folder))
    with pytest.raises(CheckpointError) as loading:
        LocalRunner(folder)
    assert str(loading.value) == str(refused.value)
    return str(refused.value).removeprefix(f"{folder}: ")


@case(65, "all", "missing tensors are named")
@each_family
@pytest.mark.parametrize("kind", [EXPERT, NORM, GATE], ids=["expert", "norm", "gate"])
def test_missing(tmp_path: Path, family: str, kind: dict[str, str]) -> None:
    name = kind[family]

    def change(tensors: dict[str, Tensor]) -> None:
        del tensors[name]

    assert _named(problem(broken(tmp_path, family, change)), "missing tensors") == [name]


@case(65, "all", "unexpected tensors are named")
@each_family
def test_unexpected(tmp_path: Path, family: str) -> None:
    extra = [GATE[family].replace(".weight", ".bias"), EXPERT[family].replace("1", "9", 1)]
    folder = broken(
        tmp_path, family, lambda tensors: tensors.update({n: torch.ones(3) for n in extra})
    )
    assert _named(problem(folder), "unexpected tensors") == sorted(extra)


@case(65, "all", "wrongly shaped tensors are named, with both shapes")
@each_family
@pytest.mark.parametrize("kind", [EXPERT, NORM, GATE], ids=["expert", "norm", "gate"])
@pytest.mark.parametrize("how", ["longer", "shorter", "deeper"])
def test_wrong_shape(tmp_path: Path, family: str, kind: dict[str, str], how: str) -> None:
    name = kind[family]
    change = {
        "longer": lambda t: torch.cat([t, t[:1]]),
        "shorter": lambda t: t[:-1].clone(),
        "deeper": lambda t: t[None].clone(),
    }[how]
    shapes: list[list[int]] = []

    def alter(tensors: dict[str, Tensor]) -> None:
        shapes.append(list(tensors[name].shape))
        tensors[name] = change(tensors[name])
        shapes.append(list(tensors[name].shape))

    folder = broken(tmp_path, family, alter)
    right, wrong = shapes
    assert problem(folder) == f"tensors of a wrong shape: {name} is {wrong}, not {right}"


@case(65, "all", "all problems in one error")
@each_family
def test_all_at_once(tmp_path: Path, family: str) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        del tensors[EXPERT[family]]
        tensors[NORM[family]] = torch.ones(5)
        tensors["surplus"] = torch.ones(1)

    said = problem(broken(tmp_path, family, change))
    assert _named(said, "missing tensors") == [EXPERT[family]]
    assert _named(said, "unexpected tensors") == ["surplus"]
    assert f"wrong shape: {NORM[family]} is [5], not " in said
    assert "\n" not in said


@case(65, "all", "an index that promises what its files do not hold")
@each_family
def test_index_and_files_disagree(tmp_path: Path, family: str) -> None:
    folder = broken(tmp_path, family, lambda tensors: None)
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"][EXPERT[family] + ".more"] = "part-0.safetensors"
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=f"promises tensor {EXPERT[family]}.more"):
        Checkpoint(folder)


def _named(said: str, what: str) -> list[str]:
    """The names that follow `what`, in their first spelling."""
    (listed,) = [part for part in said.split("; ") if part.startswith(f"{what}: ")]
    names = listed.removeprefix(f"{what}: ").split(", ")
    return [name.split(" or ")[0] for name in names]
