"""One socket of a `SocketTransport`: its reader, its handshake and who is at the other end."""

from __future__ import annotations

import socket
import time

from router.transport.base import Frame, FrameKind, Header
from router.transport.framing import MAX_FRAME_BYTES, STAGING_BYTES, FrameReader, frame_parts
from router.transport.handshake import Handshake, HandshakeRefused, Identity

HELLO_BYTES = 2 << 10
"""Largest frame accepted from a connection that has not proved itself."""


class Connection:
    """A connected non-blocking socket; `peer` is None until its handshake is done.

    `patience` (seconds) bounds each step of the handshake.
    """

    def __init__(
        self, sock: socket.socket, handshake: Handshake, *, dialed: bool, patience: float
    ) -> None:
        self.sock = sock
        self.reader = FrameReader(3 * HELLO_BYTES, HELLO_BYTES)
        self.dialed = dialed
        self.peer: Identity | None = None
        self.closed = False
        self.deadline = time.monotonic() + patience
        self._handshake = handshake
        self._patience = patience

    def receive(self) -> bool:
        """Read what is there into the reader; False at the end of the stream.

        Raises BlockingIOError when there is nothing, or another OSError.
        """
        num_bytes = self.sock.recv_into(self.reader.space())
        self.reader.advance(num_bytes)
        return num_bytes > 0

    def greet(self, frame: Frame) -> Identity | None:
        """Take one handshake frame and answer it; gives (and sets) `peer` at the end.

        Raises HandshakeRefused, UnicodeDecodeError or OSError.
        """
        if frame.header.kind is not FrameKind.HELLO or frame.buffers:
            raise HandshakeRefused("the first frames must be HELLO")
        reply = self._handshake.answer(frame.meta)
        self.deadline = time.monotonic() + self._patience
        if reply is not None:
            self.say_hello(reply)
        self.peer = self._handshake.peer
        if self.peer is not None:
            self.reader.widen(STAGING_BYTES, MAX_FRAME_BYTES)
        return self.peer

    def say_hello(self, payload: bytes) -> None:
        """Write one handshake frame. Raises OSError."""
        # A fresh socket has room for this: anything but one whole write is a failure.
        parts, total = frame_parts(Frame(Header(kind=FrameKind.HELLO), payload))
        try:
            sent = self.sock.sendmsg(parts)
        except BlockingIOError:
            sent = 0
        if sent != total:
            raise ConnectionError("handshake not written")


def unsent(parts: list[bytes | memoryview], sent: int) -> list[bytes | memoryview]:
    """What is left of `parts` after their first `sent` bytes."""
    for idx, part in enumerate(parts):
        rest = memoryview(part)
        if sent < rest.nbytes:
            return [rest.cast("B")[sent:], *parts[idx + 1 :]]
        sent -= rest.nbytes
    return []
