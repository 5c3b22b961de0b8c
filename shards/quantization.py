"""Weight-only int8: what is quantised, how, and where a checkpoint keeps it.

Every output channel of a matrix (a row in memory) has one float32 scale, its largest magnitude over
127; activations keep their dtype. The scheme is that of AI21's ExpertsInt8.
"""

from __future__ import annotations

import torch
from torch import Tensor

from models.interface import StageModel, TensorSlice, TensorSource

_LARGEST = 127
_CHUNK_ELEMENTS = 1 << 19
"""Elements rounded at once: bounds memory, cannot change values."""


def quantize_rows(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """[N, K] → int8 values [N, K] and float32 scales [N]; values · scale is within scale / 2.

    Raises ValueError where a value is not finite.
    """
    low, high = matrix.aminmax(dim=1)
    largest = torch.maximum(high, -low).float()
    if not bool(largest.isfinite().all()):
        raise ValueError("a value is not finite")
    scale = largest / _LARGEST
    # A row of zeros has scale 0: any divisor does.
    divisor = torch.where(scale == 0, 1.0, scale)[:, None]
    values = torch.empty(matrix.shape, dtype=torch.int8, device=matrix.device)
    rows = max(1, _CHUNK_ELEMENTS // matrix.shape[1])
    for start in range(0, matrix.shape[0], rows):
        chunk = slice(start, start + rows)
        exact = matrix[chunk].float() / divisor[chunk]
        values[chunk] = exact.round_().clamp_(-_LARGEST, _LARGEST)
    return values, scale


def int8_parameters(stage: StageModel, quantization: str) -> frozenset[str]:
    """Parameters of a stage that are int8; the routed experts are, except with `none`."""
    return stage.quantizable() if quantization == "int8-all" else frozenset()


def scale_name(name: str) -> str:
    """The tensor beside tensor `name` that holds its scales."""
    return f"{name}_scale"


def scale_slice(matrix: TensorSlice) -> TensorSlice:
    """Where the scales [N] of a quantised `matrix` [N, K] are: one tensor beside each of its own.

    Its shape is that of the tensor without the dimension that a scale spans. Where rows are turned
    into columns when read (DBRX's w2 [E*F, D]), every block of rows has a row of scales [E, D].
    """
    return TensorSlice(
        sources=tuple(_scale_source(source, matrix) for source in matrix.sources),
        shape=matrix.shape[:1],
        parts=tuple(scale_slice(part) for part in matrix.parts),
    )


def _scale_source(source: TensorSource, matrix: TensorSlice) -> TensorSource:
    name = scale_name(source.name)
    if source.transpose and source.start is not None:
        return TensorSource(name, index=source.start // matrix.shape[1])
    return TensorSource(name, source.start, source.stop, source.index)
