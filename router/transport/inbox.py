"""What a transport has received and nobody has taken yet: in order, and bounded."""

from __future__ import annotations

from collections import deque

from router.transport.base import Frame, Lost, Received
from router.transport.framing import MAX_FRAME_BYTES, MalformedFrame, num_bytes

MAX_UNREAD_BYTES = 2 * MAX_FRAME_BYTES
"""Of all peers together: a send that waits goes on receiving, but not without end."""


class Inbox:
    """Frames and losses of all peers, the oldest first."""

    def __init__(self, max_bytes: int) -> None:
        self._items: deque[Received | Lost] = deque()
        self._max_bytes = max_bytes
        self._bytes = 0

    def __bool__(self) -> bool:
        return bool(self._items)

    def put(self, peer: str, frame: Frame) -> None:
        """Queue a frame. Raises MalformedFrame, once it is queued, when it was one too many."""
        self._items.append(Received(peer, frame))
        self._bytes += num_bytes(frame)
        if self._bytes > self._max_bytes:
            raise MalformedFrame(f"{self._bytes} bytes unread: allowed {self._max_bytes}")

    def lose(self, peer: str) -> None:
        """Queue the news that a peer is gone."""
        self._items.append(Lost(peer))

    def forget_loss(self, peer: str) -> None:
        """The peer is there again: news of its loss would be taken for a new one."""
        self._items = deque(item for item in self._items if item != Lost(peer))

    def take(self) -> Received | Lost:
        """The oldest."""
        item = self._items.popleft()
        if isinstance(item, Received):
            self._bytes -= num_bytes(item.frame)
        return item
