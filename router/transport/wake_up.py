"""How other threads end a wait for sockets: a flag, and a socket that becomes readable with it."""

from __future__ import annotations

import socket
import threading
from contextlib import suppress


class WakeUp:
    """Set by any thread, taken by the one that owns the transport."""

    def __init__(self) -> None:
        self.is_set = False
        self._closed = False
        self._lock = threading.Lock()
        self.socket, self._writer = socket.socketpair()
        self.socket.setblocking(False)

    def set(self) -> None:
        """Make the socket readable; once is enough until `take`. Thread-safe."""
        with self._lock:
            if not self.is_set and not self._closed:
                self.is_set = True
                self._writer.send(b"\0")

    def take(self) -> None:
        """The owner has noticed."""
        with self._lock:
            self.is_set = False
            self.empty()

    def empty(self) -> None:
        """Read the socket, so that a wait that must go on sleeps: the flag is what counts."""
        with suppress(BlockingIOError):
            self.socket.recv(1)

    def close(self) -> None:
        """From now on `set` does nothing."""
        with self._lock:
            self._closed = True
            self.socket.close()
            self._writer.close()
