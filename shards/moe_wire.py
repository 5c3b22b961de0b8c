"""The frames between a stage and the dispatcher: one MoE exchange there and back."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from models.interface import Routing
from router.transport.base import Frame, FrameKind, Header
from router.transport.tensors import buffer_tensor, tensor_buffer, torch_dtype, wire_dtype


@dataclass(frozen=True, slots=True)
class MoeShape:
    """Widths that a frame need not repeat: hidden size D and experts per token k."""

    hidden_size: int
    top_k: int


def moe_call(key: Header, hidden: Tensor, routing: Routing) -> Frame:
    """A stage asks for the combined expert outputs of [T, D] rows."""
    header = key._replace(kind=FrameKind.MOE_CALL, dtype=wire_dtype(hidden.dtype))
    # The widest elements first: what follows them is aligned too.
    tensors = (routing.expert_ids, hidden, routing.weights)
    return Frame(header, b"", tuple(tensor_buffer(t.contiguous()) for t in tensors))


def read_moe_call(frame: Frame, shape: MoeShape) -> tuple[Tensor, Tensor, Tensor]:
    """The [T, D] hidden rows, [T, k] int64 expert ids and [T, k] weights of a call.

    Raises ValueError when the buffers do not fit together.
    """
    dtype = torch_dtype(frame.header.dtype)
    expert_ids, hidden, weights = frame.buffers
    rows = read_rows(hidden, dtype, shape.hidden_size)
    choices = (len(rows), shape.top_k)
    return (
        rows,
        buffer_tensor(expert_ids, torch.int64, choices),
        buffer_tensor(weights, dtype, choices),
    )


def moe_result(key: Header, combined: Tensor) -> Frame:
    """The answer: [T, D] rows combined in routing order."""
    header = key._replace(kind=FrameKind.MOE_RESULT, dtype=wire_dtype(combined.dtype))
    return Frame(header, b"", (tensor_buffer(combined.contiguous()),))


def read_moe_result(frame: Frame, shape: MoeShape) -> Tensor:
    """The [T, D] rows of an answer. Raises ValueError when they are not there."""
    (rows,) = frame.buffers
    return read_rows(rows, torch_dtype(frame.header.dtype), shape.hidden_size)


def read_rows(buffer: memoryview, dtype: torch.dtype, hidden_size: int) -> Tensor:
    """Activations [T, D] of a frame. Raises ValueError when they are not whole rows."""
    num_rows = buffer.nbytes // (hidden_size * dtype.itemsize)
    return buffer_tensor(buffer, dtype, (num_rows, hidden_size))
