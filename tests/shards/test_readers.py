"""Weights read by several threads: the same bytes in the same places, and errors by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from models.interface import TensorSlice, TensorSource
from shards import readers as readers_module
from shards.checkpoint import Checkpoint, CheckpointError
from shards.pages import Arena
from shards.readers import Readers

SHAPES = {"a": (919, 531), "b": (7, 33, 65), "c": (1, 4), "d": (40_000,), "e": (0, 3)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(1)
    tensors = {n: torch.randn(shape, generator=generator) for n, shape in SHAPES.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path


def whole(name: str, *, transpose: bool = False) -> TensorSlice:
    shape = tuple(reversed(SHAPES[name])) if transpose else SHAPES[name]
    return TensorSlice(shape=shape, sources=(TensorSource(name=name, transpose=transpose),))


@pytest.mark.parametrize("num_threads", [1, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_readers_give_the_bytes_of_the_file(
    num_threads: int, dtype: torch.dtype, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers_module, "_RUN_BYTES", 10_000)
    stored = load_file(folder / "model.safetensors")
    counted: list[int] = []
    checkpoint = Checkpoint(folder, counted.append)
    plain = {name: whole(name) for name in ("d", "a", "c", "e")}
    source = TensorSource(name="b", index=4, start=9, stop=14)
    middle = TensorSlice(shape=(5, 65), sources=(source,))
    with Readers(checkpoint, num_threads) as readers:
        arena = Arena()
        read = {name: readers.read(each, dtype, arena=arena) for name, each in plain.items()}
        turned = readers.read(whole("a", transpose=True), dtype)
        slab = readers.read(middle, dtype)
    for name, tensor in read.items():
        assert torch.equal(tensor, stored[name].to(dtype))
    assert torch.equal(turned, stored["a"].t().to(dtype))
    assert torch.equal(slab, stored["b"][4, 9:14].to(dtype))
    num_bytes = sum(stored[name].nbytes for name in ("d", "a", "c", "e", "a")) + 5 * 65 * 4
    assert checkpoint.bytes_read == sum(counted) == num_bytes


def read_all(checkpoint: Checkpoint, *slices: TensorSlice) -> None:
    with Readers(checkpoint) as readers:
        for each in slices:
            readers.read(each, torch.float32)


def test_a_file_that_shrank_ends_all_readers_with_its_name(folder: Path) -> None:
    checkpoint = Checkpoint(folder)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: tensor \w cannot be read"):
        read_all(checkpoint, *map(whole, ("a", "b", "d")))


def test_what_is_not_there_is_said_before_anything_is_read(folder: Path) -> None:
    checkpoint = Checkpoint(folder)
    missing = TensorSlice(shape=(2,), sources=(TensorSource(name="z"),))
    with pytest.raises(CheckpointError, match="missing tensor z"):
        read_all(checkpoint, whole("a"), missing)
    assert checkpoint.bytes_read == 0
