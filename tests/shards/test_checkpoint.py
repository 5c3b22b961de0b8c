"""Checkpoints: only the needed bytes are read, and whatever is wrong is named."""

from __future__ import annotations

import errno
import json
import os
import resource
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from models.interface import TensorSlice, TensorSource
from models.registry import load_config
from shards.checkpoint import Checkpoint, CheckpointError
from shards.loading import load_experts, load_stage
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
    turned = TensorSlice(sources=(TensorSource("a", 1, 3, transpose=True),), shape=(4, 2))
    rows = checkpoint.read(turned, torch.float32)
    assert torch.equal(rows, a[1:3].t())
    assert rows.is_contiguous()
    assert torch.equal(checkpoint.read(wanted("b", 5, 3, index=1), torch.float32), b[1])
    rows = checkpoint.read(wanted("b", 2, 3, index=0, start=3, stop=5), torch.float32)
    assert torch.equal(rows, b[0, 3:5])
    assert checkpoint.bytes_read == 2 * 32 + 5 * 3 * 2 + 2 * 3 * 2
    assert torch.equal(checkpoint.read(wanted("a", 6, 4), torch.float32), a)


def test_parts_are_read_below_each_other(small: Path) -> None:
    parts = (wanted("b", 2, 3, index=1, start=3, stop=5), wanted("b", 1, 3, index=0, stop=1))
    b = torch.arange(30, dtype=torch.float32).reshape(2, 5, 3)
    checkpoint = Checkpoint(small)
    both = TensorSlice(shape=(3, 3), parts=parts)
    assert torch.equal(checkpoint.read(both, torch.float32), torch.cat([b[1, 3:5], b[0, :1]]))
    assert checkpoint.bytes_read == checkpoint.num_bytes(both) == 3 * 3 * 2


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_more_than_one_piece(stored: torch.dtype, tmp_path: Path) -> None:
    # 3 MiB and more, in rows that do not divide a piece: every way of reading has a last part.
    values = torch.randn(1021, 1531).to(stored)
    save_file({"a": values}, tmp_path / "model.safetensors")
    reads: list[int] = []
    checkpoint = Checkpoint(tmp_path, reads.append)
    for dtype in (torch.float32, torch.bfloat16):
        rows = checkpoint.read(wanted("a", 919, 1531, start=101, stop=1020), dtype)
        assert torch.equal(rows, values[101:1020].to(dtype))
        source = TensorSource("a", transpose=True)
        turned = TensorSlice(sources=(source,), shape=(1531, 1021))
        assert torch.equal(checkpoint.read(turned, dtype), values.t().to(dtype))
    assert reads[0] == 0
    assert len(reads) > 8
    assert sum(reads) == checkpoint.bytes_read == 2 * (919 + 1021) * 1531 * stored.itemsize


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


def _with_header(header: object, data: bytes, length: int | None = None) -> bytes:
    text = json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def _f32(begin: int, end: int, *shape: int) -> dict[str, object]:
    return {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"", id="no bytes at all"),
        pytest.param(b"\0" * 7, id="shorter than a header's length"),
        pytest.param(_with_header({"a": _f32(0, 8, 2)}, bytes(7)), id="shorter than its data"),
        pytest.param(_with_header({"a": _f32(0, 8, 2)}, bytes(9)), id="longer than its data"),
        pytest.param(_with_header({"a": _f32(0, 8, 2)}, bytes(8), 2**63), id="absurd header"),
        pytest.param(_with_header({"a": _f32(0, 8, 2)}, bytes(8), 2**20), id="header past the end"),
        pytest.param(
            _with_header({"a": _f32(0, 8, 2), "b": _f32(4, 12, 2)}, bytes(12)), id="overlap"
        ),
        pytest.param(
            _with_header({"a": _f32(0, 8, 2), "b": _f32(12, 16, 1)}, bytes(16)), id="hole"
        ),
        pytest.param(_with_header({"a": _f32(64, 72, 2)}, bytes(8)), id="out of range"),
        pytest.param(_with_header({"a": _f32(8, 0, 2)}, bytes(8)), id="backwards"),
        pytest.param(_with_header({"a": _f32(-8, 0, 2)}, bytes(8)), id="negative"),
        pytest.param(_with_header({"a": _f32(0, 8, 3)}, bytes(8)), id="shape of another size"),
        pytest.param(_with_header({"a": _f32(0, 8, 2**62, 2**62)}, bytes(8)), id="huge shape"),
        pytest.param(_with_header({"a": {"dtype": "F32"}}, bytes(8)), id="fields missing"),
        pytest.param(_with_header([1, 2], b""), id="not an object"),
        pytest.param((8).to_bytes(8, "little") + b"\xff" * 16, id="not text"),
    ],
)
def test_corrupt_headers_are_one_line(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: corrupt or trunc") as error:
        Checkpoint(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["model.safetensors", "model.safetensors.index.json"])
def test_files_that_cannot_be_opened_say_why(tmp_path: Path, name: str) -> None:
    save_file({"a": torch.zeros(2)}, tmp_path / name)
    # No free descriptor: unlike a file's permissions, this stops the superuser as well.
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        with pytest.raises(CheckpointError) as error:
            Checkpoint(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert str(error.value) == f"{tmp_path / name}: cannot be read: {os.strerror(errno.EMFILE)}"


def test_a_file_that_shrank_since_is_named(small: Path) -> None:
    checkpoint = Checkpoint(small)
    file = small / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: tensor b cannot be read"):
        checkpoint.read(wanted("b", 5, 3, index=1), torch.float32)
    file.unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors: tensor a cannot be read"):
        checkpoint.read(wanted("a", 6, 4), torch.float32)


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
    for bad in (
        "[",
        "[" * 100_000,
        json.dumps({}),
        json.dumps({"weight_map": [1]}),
        json.dumps([]),
    ):
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
