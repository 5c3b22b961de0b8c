"""The frames between a stage and the dispatcher: one MoE exchange there and back."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from models.interface import Routing
from router.transport.base import Frame, FrameKind, Header
from router.transport.tensors import DTYPE_CODES, TORCH_DTYPES, buffer_tensor, tensor_buffer


@dataclass(frozen=True, slots=True)
class MoeShape:
    """Widths that a frame need not repeat: hidden size D and experts per token k."""

    hidden_size: int
    top_k: int


def moe_call(key: Header, hidden: Tensor, routing: Routing) -> Frame:
    """A stage asks for the combined expert outputs of [T, D] rows."""
    header = replace(key, kind=FrameKind.MOE_CALL, dtype=DTYPE_CODES[hidden.dtype])
    tensors = (hidden, routing.expert_ids, routing.weights)
    return Frame(header, b"", tuple(tensor_buffer(t.contiguous()) for t in tensors))


def read_moe_call(frame: Frame, shape: MoeShape) -> tuple[Tensor, Tensor, Tensor]:
    """The [T, D] hidden rows, [T, k] int64 expert ids and [T, k] weights of a call."""
    dtype = TORCH_DTYPES[frame.header.dtype]
    hidden, expert_ids, weights = frame.buffers
    return (
        buffer_tensor(hidden, dtype, (-1, shape.hidden_size)),
        buffer_tensor(expert_ids, torch.int64, (-1, shape.top_k)),
        buffer_tensor(weights, dtype, (-1, shape.top_k)),
    )


def moe_result(key: Header, combined: Tensor) -> Frame:
    """The answer: [T, D] rows combined in routing order."""
    header = replace(key, kind=FrameKind.MOE_RESULT, dtype=DTYPE_CODES[combined.dtype])
    return Frame(header, b"", (tensor_buffer(combined.contiguous()),))


def read_moe_result(frame: Frame, shape: MoeShape) -> Tensor:
    """The [T, D] rows of an answer."""
    dtype = TORCH_DTYPES[frame.header.dtype]
    return buffer_tensor(frame.buffers[0], dtype, (-1, shape.hidden_size))
