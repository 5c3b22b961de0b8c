"""A sharded safetensors checkpoint, written tensor by tensor and each in any number of pieces."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from router.transport.tensors import tensor_buffer
from shards.safetensors_file import INDEX_FILE

_SPELLINGS = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int8: "I8",
}
_ALIGNMENT = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedTensor:
    """A tensor to be written: all that its header says, and how to make its rows."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: Callable[[], Iterable[Tensor]]
    """Contiguous pieces, one below the other; together they have `shape`."""

    @property
    def num_bytes(self) -> int:
        """Length on disk."""
        return prod(self.shape) * self.dtype.itemsize


def write_checkpoint(
    folder: Path,
    tensors: Sequence[PlannedTensor],
    *,
    max_shard_bytes: int,
    on_written: Callable[[int], None],
) -> None:
    """Write all tensors, in order, and the index; at most one piece is in memory at a time.

    A file holds `max_shard_bytes`, or one tensor that is longer. `on_written` is told the bytes of
    each piece. Raises OSError.
    """
    shards = list(_shards(tensors, max_shard_bytes))
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        _write_file(folder / file, shard, on_written)
        weight_map.update({tensor.name: file for tensor in shard})
    total = sum(tensor.num_bytes for tensor in tensors)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _shards(
    tensors: Iterable[PlannedTensor], max_shard_bytes: int
) -> Iterator[list[PlannedTensor]]:
    shard: list[PlannedTensor] = []
    for tensor in tensors:
        if shard and sum(t.num_bytes for t in shard) + tensor.num_bytes > max_shard_bytes:
            yield shard
            shard = []
        shard.append(tensor)
    if shard:
        yield shard


def _write_file(
    file: Path, shard: Sequence[PlannedTensor], on_written: Callable[[int], None]
) -> None:
    header, offsets = _layout(shard)
    with file.open("wb") as opened:
        opened.write(header)
        for tensor in shard:
            opened.seek(len(header) + offsets[tensor.name])
            end = opened.tell() + tensor.num_bytes
            for piece in tensor.pieces():
                assert piece.dtype == tensor.dtype, (tensor.name, piece.dtype)
                opened.write(tensor_buffer(piece))
                on_written(piece.nbytes)
            assert opened.tell() == end, f"{tensor.name} is not of shape {tensor.shape}"


def _layout(shard: Iterable[PlannedTensor]) -> tuple[bytes, dict[str, int]]:
    """The header, and each tensor's place behind it.

    Length and JSON, as https://github.com/huggingface/safetensors describes the format.
    """
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offsets: dict[str, int] = {}
    start = 0
    # Wide elements first, so that every tensor is aligned to its own element's size.
    for tensor in sorted(shard, key=lambda tensor: -tensor.dtype.itemsize):
        offsets[tensor.name] = start
        end = start + tensor.num_bytes
        entries[tensor.name] = {
            "dtype": _SPELLINGS[tensor.dtype],
            "shape": tensor.shape,
            "data_offsets": [start, end],
        }
        start = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text, offsets
