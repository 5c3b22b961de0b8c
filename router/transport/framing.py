"""The bytes of a frame: a fixed little-endian header, buffer lengths, meta, buffers.

Pure parsing and packing; no sockets. Sizes are checked before anything is allocated.
"""

from __future__ import annotations

import struct
from functools import cache
from itertools import accumulate

from router.transport.base import Dtype, Frame, FrameKind, Header
from router.transport.body_pool import BodyPool

PROTOCOL_VERSION = 1
MAX_FRAME_BYTES = 1 << 30
MAX_META_BYTES = 64 << 20
MAX_BUFFERS = 512
STAGING_BYTES = 128 << 10
DIRECT_BYTES = 32 << 10
"""Bodies above this are received straight into memory of their own."""
FIRST_BYTES = 4 << 10
"""After such a body this much is read first: more of the next one would have to be copied."""

_MAGIC = b"CNCL"
# magic, version, kind, dtype, buffers, meta bytes, layer, micro_batch, source, epoch, step, table
_FIXED = struct.Struct("<4sBBBxHxxIiii4xqqq")
_KINDS = {int(kind): kind for kind in FrameKind}
_DTYPES = {int(dtype): dtype for dtype in Dtype}


class MalformedFrame(ValueError):
    """Bytes that no peer of this protocol version sends, or sizes beyond the limits."""


def num_bytes(frame: Frame) -> int:
    """What a frame carries, without its header."""
    return len(frame.meta) + sum([buffer.nbytes for buffer in frame.buffers])


@cache
def _lengths(num_buffers: int) -> struct.Struct:
    assert num_buffers <= MAX_BUFFERS, num_buffers
    return struct.Struct(f"<{num_buffers}Q")


def frame_parts(frame: Frame) -> tuple[list[bytes | memoryview], int]:
    """The pieces of one frame for a gathering write, and their total bytes; nothing is copied.

    Raises ValueError when the frame is larger than a peer would accept.
    """
    header, meta, buffers = frame
    sizes = [buffer.nbytes for buffer in buffers]
    num_buffers, body = len(sizes), len(meta) + sum(sizes)
    if len(meta) > MAX_META_BYTES or body > MAX_FRAME_BYTES or num_buffers > MAX_BUFFERS:
        raise ValueError(
            f"frame of {body} bytes ({len(meta)} meta) in {num_buffers} buffers: allowed "
            f"{MAX_FRAME_BYTES} bytes ({MAX_META_BYTES} meta) in {MAX_BUFFERS} buffers"
        )
    kind, epoch, step, layer, micro_batch, source, table_version, dtype = header
    fixed = _FIXED.pack(
        _MAGIC,
        PROTOCOL_VERSION,
        kind,
        dtype,
        num_buffers,
        len(meta),
        layer,
        micro_batch,
        source,
        epoch,
        step,
        table_version,
    )
    head = fixed + _lengths(num_buffers).pack(*sizes)
    if len(meta) <= FIRST_BYTES:
        # A small piece is cheaper copied than gathered.
        return [head + meta, *buffers], len(head) + body
    return [head, meta, *buffers], len(head) + body


class FrameReader:
    """Turns a byte stream into frames: read into `space()`, `advance`, then drain `next_frame`.

    Small frames are staged in one preallocated buffer and copied out of it; large bodies go to
    memory of their own, which is used again once no view of it is left.
    """

    def __init__(self, staging_bytes: int, max_bytes: int) -> None:
        # So `space` is never empty: what is staged without being a frame always fits.
        assert staging_bytes >= _FIXED.size + min(2 * max_bytes, 8 * MAX_BUFFERS + DIRECT_BYTES)
        self._staging = memoryview(bytearray(staging_bytes))
        self._first = self._staging
        self._max_bytes = max_bytes
        self._start = 0
        self._end = 0
        self._pool = BodyPool()
        self._body: memoryview | None = None
        self._filled = 0
        self._head: tuple[Header, int, tuple[int, ...]] | None = None

    def widen(self, staging_bytes: int, max_bytes: int) -> None:
        """Raise the limits between two frames (the peer is known now); staged bytes stay."""
        assert self._body is None
        staged = self._staging[self._start : self._end]
        self._first = self._staging = memoryview(bytearray(staging_bytes))
        self._staging[: len(staged)] = staged
        self._start, self._end = 0, len(staged)
        self._max_bytes = max_bytes

    @property
    def in_body(self) -> bool:
        """Whether the rest of a large body comes next: worth another read at once."""
        return self._body is not None

    def space(self) -> memoryview:
        """Where the next received bytes belong; never empty once `next_frame` gave None."""
        if self._body is not None:
            return self._body[self._filled :]
        if self._start == self._end:
            self._start = self._end = 0
            return self._first
        if self._start:
            staged = self._end - self._start
            self._staging[:staged] = self._staging[self._start : self._end]
            self._start, self._end = 0, staged
        return self._staging[self._end :]

    def advance(self, num_bytes: int) -> None:
        """`num_bytes` were written at the front of the last `space()`."""
        if self._body is not None:
            self._filled += num_bytes
        else:
            self._end += num_bytes

    def next_frame(self) -> Frame | None:
        """The next complete frame, or None until more bytes come. Raises MalformedFrame."""
        if self._body is not None:
            return self._direct_frame()
        available = self._end - self._start
        if available < _FIXED.size:
            return None
        header, meta_bytes, num_buffers = self._read_fixed()
        start = self._start + _FIXED.size + 8 * num_buffers
        if start > self._end:
            return None
        sizes = _lengths(num_buffers).unpack_from(self._staging, self._start + _FIXED.size)
        body = meta_bytes + sum(sizes)
        if body > self._max_bytes:
            raise MalformedFrame(f"frame of {body} bytes: allowed {self._max_bytes}")
        if body > DIRECT_BYTES:
            return self._begin_body(header, meta_bytes, sizes, start, body)
        if start + body > self._end:
            return None
        meta_end, self._start = start + meta_bytes, start + body
        self._first = self._staging
        meta = bytes(self._staging[start:meta_end])
        if not sizes:
            return Frame(header, meta)
        # Out of the staging, which is used for the next frame; and torch likes aligned memory.
        own = memoryview(bytearray(self._staging[meta_end : start + body]))
        return Frame(header, meta, _split(own, sizes))

    def _read_fixed(self) -> tuple[Header, int, int]:
        # The order of the fields is that of `frame_parts`.
        (
            magic,
            version,
            kind,
            dtype,
            num_buffers,
            meta_bytes,
            layer,
            micro_batch,
            source,
            epoch,
            step,
            table_version,
        ) = _FIXED.unpack_from(self._staging, self._start)
        if magic != _MAGIC or version != PROTOCOL_VERSION:
            raise MalformedFrame(f"magic {magic!r} version {version}: not this protocol")
        if kind not in _KINDS or dtype not in _DTYPES:
            raise MalformedFrame(f"frame kind {kind} or dtype {dtype} unknown")
        if num_buffers > min(MAX_BUFFERS, self._max_bytes // 8) or meta_bytes > MAX_META_BYTES:
            raise MalformedFrame(f"{num_buffers} buffers and {meta_bytes} meta bytes: too many")
        header = Header(
            _KINDS[kind], epoch, step, layer, micro_batch, source, table_version, _DTYPES[dtype]
        )
        return header, meta_bytes, num_buffers

    def _begin_body(
        self, header: Header, meta_bytes: int, sizes: tuple[int, ...], start: int, num_bytes: int
    ) -> Frame | None:
        """Go on with a body in memory of its own, the first buffer aligned."""
        padding = -meta_bytes % 64
        body = self._pool.take(padding + num_bytes)[padding:]
        staged = min(num_bytes, self._end - start)
        body[:staged] = self._staging[start : start + staged]
        self._start = start + staged
        self._head, self._body, self._filled = (header, meta_bytes, sizes), body, staged
        self._first = self._staging[:FIRST_BYTES]
        return self._direct_frame()

    def _direct_frame(self) -> Frame | None:
        body, head = self._body, self._head
        assert body is not None
        assert head is not None
        if self._filled < len(body):
            return None
        self._body = self._head = None
        header, meta_bytes, sizes = head
        return Frame(header, bytes(body[:meta_bytes]), _split(body[meta_bytes:], sizes))


def _split(body: memoryview, sizes: tuple[int, ...]) -> tuple[memoryview, ...]:
    if len(sizes) == 1:
        return (body,)
    stops = list(accumulate(sizes))
    return tuple(body[stop - size : stop] for size, stop in zip(sizes, stops, strict=True))
