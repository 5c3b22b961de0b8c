"""The bytes of a frame: a fixed little-endian header, buffer lengths, meta, buffers.

Pure parsing and packing; no sockets. Sizes are checked before anything is allocated.
"""

from __future__ import annotations

import struct

from router.transport.base import Dtype, Frame, FrameKind, Header

PROTOCOL_VERSION = 1
MAX_FRAME_BYTES = 1 << 30
MAX_META_BYTES = 64 << 20
MAX_BUFFERS = 512
STAGING_BYTES = 128 << 10
DIRECT_BYTES = 16 << 10
"""Pieces above this are received straight into their own memory when not already staged."""

_MAGIC = b"CNCL"
# magic, version, kind, dtype, buffers, meta bytes, layer, micro_batch, source, epoch, step, table
_FIXED = struct.Struct("<4sBBBxHxxIiii4xqqq")
_KINDS = {int(kind): kind for kind in FrameKind}
_DTYPES = {int(dtype): dtype for dtype in Dtype}


class MalformedFrame(ValueError):
    """Bytes that no peer of this protocol version sends, or sizes beyond the limits."""


def frame_parts(frame: Frame) -> tuple[list[bytes | memoryview], int]:
    """The pieces of one frame for a gathering write, and their total bytes; nothing is copied.

    Raises ValueError when the frame is larger than a peer would accept.
    """
    header = frame.header
    buffers = [memoryview(buffer) for buffer in frame.buffers]
    sizes = [buffer.nbytes for buffer in buffers]
    body = len(frame.meta) + sum(sizes)
    if len(frame.meta) > MAX_META_BYTES or body > MAX_FRAME_BYTES or len(sizes) > MAX_BUFFERS:
        raise ValueError(
            f"frame of {body} bytes ({len(frame.meta)} meta) in {len(sizes)} buffers: allowed "
            f"{MAX_FRAME_BYTES} bytes ({MAX_META_BYTES} meta) in {MAX_BUFFERS} buffers"
        )
    head = _FIXED.pack(
        _MAGIC,
        PROTOCOL_VERSION,
        header.kind,
        header.dtype,
        len(sizes),
        len(frame.meta),
        header.layer,
        header.micro_batch,
        header.source,
        header.epoch,
        header.step,
        header.table_version,
    ) + struct.pack(f"<{len(sizes)}Q", *sizes)
    parts: list[bytes | memoryview] = [head]
    if frame.meta:
        parts.append(frame.meta)
    parts += [buffer.cast("B") for buffer in buffers if buffer.nbytes]
    return parts, len(head) + body


class FrameReader:
    """Turns a byte stream into frames: read into `space()`, `advance`, then drain `next_frame`.

    Small frames are staged in one preallocated buffer; large pieces go straight to their own.
    """

    def __init__(self, staging_bytes: int, max_bytes: int) -> None:
        self._staging = memoryview(bytearray(staging_bytes))
        self._max_bytes = max_bytes
        self._start = 0
        self._end = 0
        self._header: Header | None = None
        self._sizes: tuple[int, ...] = ()
        self._body = 0
        self._pieces: list[bytearray] = []
        self._direct: bytearray | None = None
        self._filled = 0

    def widen(self, staging_bytes: int, max_bytes: int) -> None:
        """Raise the limits between two frames (the peer is known now); staged bytes stay."""
        assert self._header is None
        staged = self._staging[self._start : self._end]
        self._staging = memoryview(bytearray(staging_bytes))
        self._staging[: len(staged)] = staged
        self._start, self._end = 0, len(staged)
        self._max_bytes = max_bytes

    def space(self) -> memoryview:
        """Where the next received bytes belong; never empty once `next_frame` gave None."""
        if self._direct is not None:
            return memoryview(self._direct)[self._filled :]
        if self._start:
            staged = self._end - self._start
            self._staging[:staged] = self._staging[self._start : self._end]
            self._start, self._end = 0, staged
        return self._staging[self._end :]

    def advance(self, num_bytes: int) -> None:
        """`num_bytes` were written at the front of the last `space()`."""
        if self._direct is not None:
            self._filled += num_bytes
        else:
            self._end += num_bytes

    def next_frame(self) -> Frame | None:
        """The next complete frame, or None until more bytes come. Raises MalformedFrame."""
        if self._header is None and not self._read_head():
            return None
        if not self._pieces and self._direct is None and self._end - self._start >= self._body:
            return self._staged_frame()
        while len(self._pieces) < len(self._sizes):
            if not self._read_piece(self._sizes[len(self._pieces)]):
                return None
        header, pieces = self._header, self._pieces
        assert header is not None
        self._header, self._pieces = None, []
        return Frame(header, bytes(pieces[0]), tuple(map(memoryview, pieces[1:])))

    def _staged_frame(self) -> Frame:
        """The common case: the whole body is staged."""
        header, staging, start = self._header, self._staging, self._start
        assert header is not None
        meta_end = stop = start + self._sizes[0]
        buffers = []
        for size in self._sizes[1:]:
            # Each in its own memory: the staging is reused, and torch likes aligned data.
            buffers.append(memoryview(bytearray(staging[stop : stop + size])))
            stop += size
        self._header, self._start = None, stop
        return Frame(header, bytes(staging[start:meta_end]), tuple(buffers))

    def _read_head(self) -> bool:
        available = self._end - self._start
        if available < _FIXED.size:
            return False
        # The order of the fields is that of `frame_parts`.
        magic, version, kind, dtype, num_buffers, meta_bytes, *fields = _FIXED.unpack_from(
            self._staging, self._start
        )
        if magic != _MAGIC or version != PROTOCOL_VERSION:
            raise MalformedFrame(f"magic {magic!r} version {version}: not this protocol")
        if kind not in _KINDS or dtype not in _DTYPES:
            raise MalformedFrame(f"frame kind {kind} or dtype {dtype} unknown")
        if num_buffers > min(MAX_BUFFERS, self._max_bytes // 8) or meta_bytes > MAX_META_BYTES:
            raise MalformedFrame(f"{num_buffers} buffers and {meta_bytes} meta bytes: too many")
        if available < _FIXED.size + 8 * num_buffers:
            return False
        lengths_at = self._start + _FIXED.size
        lengths = struct.unpack_from(f"<{num_buffers}Q", self._staging, lengths_at)
        self._body = meta_bytes + sum(lengths)
        if self._body > self._max_bytes:
            raise MalformedFrame(f"frame of {self._body} bytes: allowed {self._max_bytes}")
        self._start = lengths_at + 8 * num_buffers
        self._sizes = (meta_bytes, *lengths)
        layer, micro_batch, source, epoch, step, table_version = fields
        self._header = Header(
            kind=_KINDS[kind],
            epoch=epoch,
            step=step,
            layer=layer,
            micro_batch=micro_batch,
            source=source,
            table_version=table_version,
            dtype=_DTYPES[dtype],
        )
        return True

    def _read_piece(self, size: int) -> bool:
        if self._direct is not None:
            if self._filled < size:
                return False
            self._pieces.append(self._direct)
            self._direct = None
            return True
        available = self._end - self._start
        if available >= size:
            self._pieces.append(bytearray(self._staging[self._start : self._start + size]))
            self._start += size
            return True
        if size > DIRECT_BYTES:
            self._direct = bytearray(size)
            self._direct[:available] = self._staging[self._start : self._end]
            self._filled = available
            self._start = self._end = 0
        return False
