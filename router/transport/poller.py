"""Waits for sockets: epoll where there is one, else poll."""

from __future__ import annotations

import select
import socket
import sys
from collections.abc import Callable

if sys.platform == "linux":
    _make_poll, _UNITS_PER_SECOND = select.epoll, 1
else:
    _make_poll, _UNITS_PER_SECOND = select.poll, 1000

# The same numbers for epoll and for poll.
_READ, _WRITE = 1, 4


class Poller:
    """Sockets that are watched for reading, each with what is called when there is something.

    Thinner than `selectors`, whose bookkeeping takes as long as the system call.
    """

    def __init__(self) -> None:
        self._poll = _make_poll()
        self._calls: dict[int, Callable[[], None]] = {}

    def watch(self, sock: socket.socket, call: Callable[[], None]) -> None:
        """Watch a socket until `forget`; `call` is called whenever it is readable or broken."""
        self._calls[sock.fileno()] = call
        self._poll.register(sock, _READ)

    def forget(self, sock: socket.socket) -> None:
        """Stop watching a socket; before it is closed."""
        del self._calls[sock.fileno()]
        self._poll.unregister(sock)

    def also_for_writing(self, sock: socket.socket, wanted: bool) -> None:
        """Whether room for writing calls back too."""
        self._poll.modify(sock, _READ | _WRITE if wanted else _READ)

    def wait(self, timeout: float | None) -> None:
        """Call back for every socket that is ready, or for none after `timeout` seconds."""
        for descriptor, _ in self._poll.poll(timeout and timeout * _UNITS_PER_SECOND):
            # An earlier call of this turn may have closed it.
            call = self._calls.get(descriptor)
            if call is not None:
                call()

    def close(self) -> None:
        """Give back what the system holds for it."""
        if sys.platform == "linux":
            self._poll.close()
