"""Checkpoints: only the needed bytes are read, and whatever is wrong is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from models.interface import TensorSlice, TensorSource
from models.registry import load_config
from shards.checkpoint import Checkpoint, CheckpointError
from shards.loading import load_experts, load_stage
from shards.verify import verify
from tests.tiny import FAMILIES, write_tiny


def wanted(name: str, *shape: int, **options: int) -> TensorSlice:
    return TensorSlice(sources=(TensorSource(name, **options),), shape=shape)


@pytest.fixture
def small(tmp_path: Path) -> Path:
    tensors = {
        "a": torch.arange(24, dtype=torch.float32).reshape(6, 4),
        "b": torch.arange(30, dtype=torch.bfloat16).reshape(2, 5, 3),
        "ids": torch.arange(4),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path


def test_headers(small: Path) -> None:
    checkpoint = Checkpoint(small)
    assert checkpoint.names == {"a", "b", "ids"}
    assert checkpoint.shape("b") == (2, 5, 3)
    assert checkpoint.dtype("b") is torch.bfloat16
    assert checkpoint.bytes_read == 0
    with pytest.raises(CheckpointError, match=r"ids has dtype I64; allowed: F64, F32"):
        checkpoint.read(wanted("ids", 4), torch.float32)
    with pytest.raises(CheckpointError, match="missing tensor c"):
        checkpoint.shape("c")


def test_reads_only_the_wanted_rows(small: Path) -> None:
    checkpoint = Checkpoint(small)
    a = torch.arange(24, dtype=torch.float32).reshape(6, 4)
    b = torch.arange(30, dtype=torch.float32).reshape(2, 5, 3)
    rows = checkpoint.read(wanted("a", 2, 4, start=1, stop=3), torch.bfloat16)
    assert torch.equal(rows, a[1:3].bfloat16())
    assert checkpoint.bytes_read == 2 * 4 * 4
    turned = TensorSlice(sources=(TensorSource("a", 1, 3),), shape=(4, 2), transpose=True)
    rows = checkpoint.read(turned, torch.float32)
    assert torch.equal(rows, a[1:3].t())
    assert rows.is_contiguous()
    assert torch.equal(checkpoint.read(wanted("b", 5, 3, index=1), torch.float32), b[1])
    rows = checkpoint.read(wanted("b", 2, 3, index=0, start=3, stop=5), torch.float32)
    assert torch.equal(rows, b[0, 3:5])
    assert checkpoint.bytes_read == 2 * 32 + 5 * 3 * 2 + 2 * 3 * 2
    assert torch.equal(checkpoint.read(wanted("a", 6, 4), torch.float32), a)


def test_the_first_spelling_that_is_there_wins(small: Path) -> None:
    sources = (TensorSource("hub"), TensorSource("a"), TensorSource("b"))
    either = TensorSlice(sources=sources, shape=(6, 4))
    assert Checkpoint(small).find(either).name == "a"
    neither = TensorSlice(sources=(TensorSource("x"), TensorSource("y")), shape=(1,))
    with pytest.raises(CheckpointError, match="missing tensor x or y"):
        Checkpoint(small).find(neither)


@pytest.mark.parametrize(
    ("slice_", "shape"),
    [
        (wanted("a", 5, 4), r"\[6, 4\], not \[5, 4\]"),
        (wanted("a", 2, 4, start=5, stop=7), r"\[6, 4\], not \[7, 4\]"),
        (wanted("b", 5, 3, index=2), r"\[2, 5, 3\], not \[3, 5, 3\]"),
        (wanted("a", 24), r"\[6, 4\], not \[24\]"),
        (wanted("a", 2, 3, start=0, stop=2), r"\[6, 4\], not \[2, 3\]"),
    ],
)
def test_wrong_shapes_are_named(small: Path, slice_: TensorSlice, shape: str) -> None:
    with pytest.raises(CheckpointError, match=f"tensor [ab] has shape {shape}"):
        Checkpoint(small).read(slice_, torch.float32)


def test_broken_files_are_named(small: Path) -> None:
    file = small / "model.safetensors"
    whole = file.read_bytes()
    for damage in (whole[:-5], whole[:20], b"", b"x" * 64, whole + b"junk"):
        file.write_bytes(damage)
        with pytest.raises(CheckpointError, match=r"model\.safetensors: corrupt or truncated"):
            Checkpoint(small)
    file.unlink()
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor model\.safe"):
        Checkpoint(small)
    with pytest.raises(CheckpointError, match="nowhere"):
        Checkpoint(small / "nowhere")


def test_a_bad_index_is_named(tmp_path: Path) -> None:
    index = tmp_path / "model.safetensors.index.json"

    def write_index(weight_map: object) -> None:
        index.write_text(json.dumps({"weight_map": weight_map}))

    save_file({"a": torch.zeros(2)}, tmp_path / "one.safetensors")
    write_index({"a": "one.safetensors", "b": "two.safetensors"})
    with pytest.raises(CheckpointError, match=r"two\.safetensors: missing file"):
        Checkpoint(tmp_path)
    save_file({"a": torch.zeros(2)}, tmp_path / "two.safetensors")
    with pytest.raises(CheckpointError, match=r"two\.safetensors: the index promises tensor b"):
        Checkpoint(tmp_path)
    save_file({"a": torch.zeros(2), "b": torch.zeros(2)}, tmp_path / "two.safetensors")
    with pytest.raises(CheckpointError, match=r"two\.safetensors: tensor a is in another file"):
        Checkpoint(tmp_path)
    for bad in ("[", json.dumps({}), json.dumps({"weight_map": [1]}), json.dumps([])):
        index.write_text(bad)
        with pytest.raises(CheckpointError, match="not a safetensors index"):
            Checkpoint(tmp_path)


@pytest.mark.parametrize("family", FAMILIES)
def test_stages_and_expert_shards_read_the_file_once(family: str, tmp_path: Path) -> None:
    folder = write_tiny(family, tmp_path, max_shard_size="60KB")
    files = list(folder.glob("model-*.safetensors"))
    assert len(files) > 1
    total = sum(tensor.nbytes for file in files for tensor in load_file(file).values())
    config = load_config(folder)
    reads = []
    for first, last in ((0, 1), (1, config.num_layers)):
        checkpoint = Checkpoint(folder)
        load_stage(config, checkpoint, first, last, torch.float32)
        reads.append(checkpoint.bytes_read)
    for experts in ((1, 3), (0,), (2,)):
        checkpoint = Checkpoint(folder)
        bank = load_experts(config, checkpoint, experts, torch.bfloat16)
        assert bank.experts == experts
        assert bank.num_bytes * 2 == checkpoint.bytes_read
        reads.append(checkpoint.bytes_read)
    assert sum(reads) == total
    assert all(reads)


@pytest.mark.parametrize("family", FAMILIES)
def test_verify_names_every_problem(family: str, tmp_path: Path) -> None:
    folder = write_tiny(family, tmp_path)
    config = load_config(folder)
    verify(config, Checkpoint(folder))
    file = folder / "model.safetensors"
    tensors = load_file(file)
    names = sorted(tensors)
    missing, misshapen = names[0], names[len(names) // 2]
    tensors["model.stranger"] = torch.zeros(3)
    rotary = {
        "dbrx": "transformer.blocks.0.norm_attn_norm.attn",
        "phimoe": "model.layers.0.self_attn",
    }
    if family in rotary:  # an old conversion's buffer, known to be redundant
        tensors[f"{rotary[family]}.rotary_emb.inv_freq"] = torch.zeros(8)
    tensors[misshapen] = torch.zeros((1, *tensors[misshapen].shape))
    del tensors[missing]
    save_file(tensors, file)
    checkpoint = Checkpoint(folder)
    with pytest.raises(CheckpointError) as error:
        verify(config, checkpoint)
    assert checkpoint.bytes_read == 0
    lines = str(error.value).splitlines()[1:]
    assert len(lines) == 3
    assert any("missing tensor" in line and missing in line for line in lines)
    assert any(f"tensor {misshapen} has shape [1, " in line for line in lines)
    assert "  unexpected tensor model.stranger" in lines


def test_verify_refuses_surplus_rows_of_stacked_experts(tmp_path: Path) -> None:
    folder = write_tiny("dbrx", tmp_path)
    config = load_config(folder)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("mlp.w2"))
    tensors[name] = torch.cat([tensors[name], tensors[name][:1]])
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=rf"{name} has shape \[193, 64\], not \[192, 64\]"):
        verify(config, Checkpoint(folder))
