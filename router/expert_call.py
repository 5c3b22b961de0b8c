"""What a dispatcher and an expert shard say to each other: rows in, rows out.

EXPERT_CALL: `meta` is the call's sequence number, buffers are int32 pairs (expert, count) and
rows [n, D] grouped by expert in the order of the pairs. EXPERT_RESULT: the same `meta`, rows.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from torch import Tensor

from router.transport.base import Dtype, Frame, FrameKind, Header
from router.transport.tensors import buffer_tensor, tensor_buffer, torch_dtype, wire_dtype

_SEQUENCE = struct.Struct("<Q")
_PAIR = struct.Struct("<ii")


def expert_call(
    key: Header,
    table_version: int,
    sequence: int,
    pairs: Sequence[tuple[int, int]],
    rows: memoryview,
    dtype: Dtype,
) -> Frame:
    """Ask a shard for the outputs of `rows`, [n, D] in `dtype`: `pairs` of (expert, count)."""
    _, epoch, step, layer, micro_batch, source, _, _ = key
    header = Header(
        FrameKind.EXPERT_CALL, epoch, step, layer, micro_batch, source, table_version, dtype
    )
    packed = b"".join([_PAIR.pack(expert, count) for expert, count in pairs])
    return Frame(header, _SEQUENCE.pack(sequence), (memoryview(packed), rows))


def read_expert_call(frame: Frame) -> tuple[list[tuple[int, int]], Tensor]:
    """An expert shard's work: ((expert, count), …) and rows [n, D] in that order, shared memory.

    Raises ValueError when the buffers do not fit together.
    """
    pairs_buffer, rows_buffer = frame.buffers
    if pairs_buffer.nbytes % _PAIR.size:
        raise ValueError(f"expert call with {pairs_buffer.nbytes} bytes of pairs: not whole pairs")
    dtype = torch_dtype(frame.header.dtype)
    pairs = list(_PAIR.iter_unpack(pairs_buffer))
    num_rows = 0
    for _, count in pairs:
        if count < 1:
            raise ValueError(f"expert call with pairs {pairs}: every count must be 1 or more")
        num_rows += count
    if not num_rows:
        raise ValueError("expert call without pairs: allowed one or more")
    hidden_size = rows_buffer.nbytes // (num_rows * dtype.itemsize)
    return pairs, buffer_tensor(rows_buffer, dtype, (num_rows, hidden_size))


def expert_result(frame: Frame, rows: Tensor) -> Frame:
    """The answer to an EXPERT_CALL `frame`: outputs [n, D] in the order of its rows."""
    _, epoch, step, layer, micro_batch, source, table_version, _ = frame.header
    header = Header(
        FrameKind.EXPERT_RESULT,
        epoch,
        step,
        layer,
        micro_batch,
        source,
        table_version,
        wire_dtype(rows.dtype),
    )
    return Frame(header, frame.meta, (tensor_buffer(rows.contiguous().cpu()),))


def call_sequence(frame: Frame) -> int:
    """Which call of the dispatcher an EXPERT_CALL or EXPERT_RESULT belongs to.

    Raises ValueError when the frame does not say.
    """
    if len(frame.meta) != _SEQUENCE.size:
        raise ValueError(f"sequence number of {len(frame.meta)} bytes: allowed {_SEQUENCE.size}")
    sequence: int = _SEQUENCE.unpack(frame.meta)[0]
    return sequence
