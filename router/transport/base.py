"""The smallest transport: named peers, frames in, frames out.

A transport belongs to one thread (the worker's data loop); only `wake` may be called from others.
What is built for every frame is a named tuple: a frozen dataclass takes five times as long.
"""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple, Protocol


class FrameKind(IntEnum):
    """What a frame carries; the receiver decodes `meta` and `buffers` by it."""

    HELLO = 1
    CONTROL = 2
    EVENT = 3
    ADMIT = 10
    ABORT = 11
    TOKENS = 12
    STEP = 20
    RESULT = 21
    MOE_CALL = 30
    MOE_RESULT = 31
    EXPERT_CALL = 40
    EXPERT_RESULT = 41
    TABLE = 42


class Dtype(IntEnum):
    """Element type of a frame's activation buffers."""

    NONE = 0
    FLOAT32 = 1
    BFLOAT16 = 2
    FLOAT16 = 3


class Header(NamedTuple):
    """Fixed part of a frame; (epoch, step, layer, micro_batch, table_version) keys expert calls.

    `source` is the index of the stage a call came from, so that answers find their way back.
    """

    kind: FrameKind
    epoch: int = 0
    step: int = 0
    layer: int = 0
    micro_batch: int = 0
    source: int = 0
    table_version: int = 0
    dtype: Dtype = Dtype.NONE

    @property
    def key(self) -> tuple[int, int, int, int, int]:
        """Identity of one exchange, whatever the table version it was sent under."""
        return (self.epoch, self.step, self.layer, self.micro_batch, self.source)


class Frame(NamedTuple):
    """One message: header, a small encoded `meta`, and raw buffers (C-contiguous, bytes-like)."""

    header: Header
    meta: bytes = b""
    buffers: tuple[memoryview, ...] = ()


class PeerLost(ConnectionError):
    """Raised by `send` when the peer's connection is gone; `recv` reports the same as Lost."""

    def __init__(self, peer: str) -> None:
        super().__init__(f"peer {peer} is gone")
        self.peer = peer


class Received(NamedTuple):
    """A frame and who sent it."""

    peer: str
    frame: Frame


class Lost(NamedTuple):
    """A peer's connection ended (its process died, or it closed)."""

    peer: str


class Transport(Protocol):
    """Frames between named peers, in order per peer, delivered at most once."""

    @property
    def address(self) -> str:
        """Where others reach this transport: `unix:…`, `tcp:host:port` or `local:…`.

        Several addresses are joined by commas; `connect` takes the first that is usable here.
        """

    def connect(self, peer: str, address: str, patience: float | None = None) -> None:
        """Dial `peer`; replaces an earlier connection of that name. Raises PeerLost.

        `patience` (seconds) bounds each step of it, for those who have others to serve meanwhile.
        """

    def send(self, peer: str, frame: Frame) -> None:
        """Queue or write one frame. Never deadlocks on a peer that is also sending.

        Raises PeerLost when the peer is unknown or gone.
        """

    def recv(self, timeout: float | None) -> Received | Lost | None:
        """Next frame or loss; None after `timeout` seconds (0 polls) or after `wake`."""

    def drop(self, peer: str, reason: str) -> None:
        """Break off with a peer that sends nonsense: `recv` reports it as Lost."""

    def wake(self) -> None:
        """Make a blocked `recv` return None. Thread-safe."""

    def close(self) -> None:
        """Close every connection and the listener."""
