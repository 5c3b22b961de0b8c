"""Tensors as frame buffers and back, without copies."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from router.transport.base import Dtype

_TORCH = {
    Dtype.FLOAT32: torch.float32,
    Dtype.BFLOAT16: torch.bfloat16,
    Dtype.FLOAT16: torch.float16,
}
# NumPy has no bfloat16, and Python's buffers no float16.
_STAND_INS = {torch.bfloat16: torch.int16, torch.float16: torch.int16}
_WIRE = {torch_dtype: wire for wire, torch_dtype in _TORCH.items()}


def torch_dtype(dtype: Dtype) -> torch.dtype:
    """The torch dtype of a frame's activations. Raises ValueError for NONE."""
    if dtype not in _TORCH:
        raise ValueError(f"frame dtype {dtype!r}: allowed {', '.join(d.name for d in _TORCH)}")
    return _TORCH[dtype]


def wire_dtype(dtype: torch.dtype) -> Dtype:
    """The frame dtype of torch activations. Raises ValueError for any other torch dtype."""
    if dtype not in _WIRE:
        raise ValueError(f"dtype {dtype}: allowed {', '.join(str(d) for d in _WIRE)}")
    return _WIRE[dtype]


def tensor_buffer(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor of any dtype, shared with it.

    The view keeps the memory alive. Raises ValueError for another device or layout.
    """
    if not tensor.is_cpu or not tensor.is_contiguous():
        raise ValueError(
            f"tensor {tuple(tensor.shape)} on {tensor.device}, contiguous="
            f"{tensor.is_contiguous()}: allowed contiguous CPU tensors"
        )
    if not tensor.numel():
        return memoryview(b"")
    stand_in = _STAND_INS.get(tensor.dtype)
    same_bytes = tensor.detach() if stand_in is None else tensor.detach().view(stand_in)
    return same_bytes.numpy().data.cast("B")


def buffer_tensor(buffer: memoryview, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """A tensor over the bytes of a writable buffer, shared with it.

    Raises ValueError when the size is not that of `shape`.
    """
    num_bytes = math.prod(shape) * dtype.itemsize
    if buffer.nbytes != num_bytes:
        raise ValueError(f"buffer of {buffer.nbytes} bytes: {dtype} {shape} takes {num_bytes}")
    if not num_bytes:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(buffer, dtype=dtype).view(shape)
