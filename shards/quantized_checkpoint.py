"""What a quantised copy of a checkpoint holds: hub names, int8 values, scales beside them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from models.interface import ModelConfig, TensorSlice
from shards.checkpoint import Checkpoint, extent_on_disk
from shards.checkpoint_writer import PlannedTensor
from shards.loading import read_int8
from shards.quantization import scale_slice
from shards.verify import model_slices


@dataclass(frozen=True, slots=True)
class _Source:
    """The slices, in their order, that make up one tensor of the copy."""

    slices: list[TensorSlice]
    is_int8: bool


def plan_quantized(
    config: ModelConfig, checkpoint: Checkpoint, quantization: str
) -> list[PlannedTensor]:
    """Every tensor of the copy; the source's values are read only when it is written."""
    sources: dict[str, _Source] = {}
    for leaf, is_int8 in model_slices(config, quantization):
        found, hub = checkpoint.find(leaf), leaf.sources[0]
        if found != hub and found.name in sources:
            continue  # a tied head: the table that it shares is written once, as the source does
        sources.setdefault(hub.name, _Source([], is_int8)).slices.append(leaf)
    return [
        tensor
        for name, source in sources.items()
        for tensor in (
            _int8_tensors(config, checkpoint, name, source.slices)
            if source.is_int8
            else (_same_tensor(checkpoint, name, source.slices),)
        )
    ]


def _same_tensor(checkpoint: Checkpoint, name: str, slices: list[TensorSlice]) -> PlannedTensor:
    dtype = checkpoint.dtype(checkpoint.find(slices[0]).name)

    def pieces() -> Iterator[Tensor]:
        for part in slices:
            yield _as_stored(part, checkpoint.read(part, dtype))

    return PlannedTensor(name=name, dtype=dtype, shape=_shape(slices), pieces=pieces)


def _int8_tensors(
    config: ModelConfig, checkpoint: Checkpoint, name: str, slices: list[TensorSlice]
) -> tuple[PlannedTensor, PlannedTensor]:
    """The values and, gathered while those are written, the scales."""
    scales: list[Tensor] = []

    def values() -> Iterator[Tensor]:
        for part in slices:
            matrix, scale = read_int8(config, checkpoint, part)
            scales.append(scale)
            yield _as_stored(part, matrix)

    scale_slices = [scale_slice(part) for part in slices]
    return (
        PlannedTensor(name=name, dtype=torch.int8, shape=_shape(slices), pieces=values),
        PlannedTensor(
            name=scale_slices[0].sources[0].name,
            dtype=torch.float32,
            shape=_shape(scale_slices),
            pieces=lambda: iter(scales),
        ),
    )


def _as_stored(part: TensorSlice, tensor: Tensor) -> Tensor:
    return tensor.t().contiguous() if part.sources[0].transpose else tensor


def _shape(slices: list[TensorSlice]) -> tuple[int, ...]:
    """The shape on disk of the tensor that `slices` make up under its hub name."""
    extents = [extent_on_disk(part, part.sources[0]) for part in slices]
    return tuple(max(sizes) for sizes in zip(*extents, strict=True))
