"""Frames between threads of one process, with the same semantics as the socket transport."""

from __future__ import annotations

import itertools
import threading
import time
from collections import deque

from router.transport.base import Frame, Lost, PeerLost, Received


class LocalNetwork:
    """The transports of one process that can reach each other; pass it explicitly."""

    def __init__(self) -> None:
        # One lock for all: a link changes both of its ends at once.
        self.lock = threading.Lock()
        self.transports: dict[str, LocalTransport] = {}
        self._numbers = itertools.count()

    def unique_address(self, name: str) -> str:
        """`local:name#n`, never used before, so that a respawn is another address."""
        return f"local:{name}#{next(self._numbers)}"


class LocalTransport:
    """A named peer's inbox on a `LocalNetwork`. Owned by one thread; `wake` may come from any."""

    def __init__(self, name: str, network: LocalNetwork) -> None:
        self.name = name
        self._network = network
        self._changed = threading.Condition(network.lock)
        self._inbox: deque[Received | Lost] = deque()
        self._links: dict[str, LocalTransport] = {}
        self._woken = False
        self._closed = False
        with network.lock:
            self._address = network.unique_address(name)
            network.transports[self._address] = self

    @property
    def address(self) -> str:
        """`local:name#n`."""
        return self._address

    def connect(self, peer: str, address: str, patience: float | None = None) -> None:
        """Link with `peer`; replaces an earlier connection of that name. Raises PeerLost."""
        with self._network.lock:
            for endpoint in address.split(","):
                target = self._network.transports.get(endpoint)
                if target is not None and target.name == peer and not self._closed:
                    self._link(target)
                    target._link(self)
                    return
        raise PeerLost(peer)

    def send(self, peer: str, frame: Frame) -> None:
        """Put a copy of one frame into the peer's inbox. Raises PeerLost."""
        # Copied like on a socket: the sender may reuse its buffers at once.
        buffers = tuple(memoryview(bytearray(buffer)) for buffer in frame.buffers)
        with self._network.lock:
            target = self._links.get(peer)
            if target is None:
                raise PeerLost(peer)
            target._deliver(Received(self.name, Frame(frame.header, frame.meta, buffers)))

    def recv(self, timeout: float | None) -> Received | Lost | None:
        """Next frame or loss; None after `timeout` seconds (0 polls) or after `wake`.

        Raises ConnectionError when this transport is closed.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        with self._network.lock:
            while True:
                if self._closed:
                    raise ConnectionError(f"transport {self.name} is closed")
                if self._woken:
                    self._woken = False
                    return None
                if self._inbox:
                    return self._inbox.popleft()
                remaining = None if deadline is None else deadline - time.monotonic()
                if remaining is not None and remaining <= 0:
                    return None
                self._changed.wait(remaining)

    def drop(self, peer: str, reason: str) -> None:
        """Break off with a peer; both ends see Lost."""
        with self._network.lock:
            target = self._links.get(peer)
            if target is not None:
                target._unlink(self)
                self._unlink(target)

    def wake(self) -> None:
        """Make a blocked `recv` (or the next one) return None. Thread-safe."""
        with self._network.lock:
            self._woken = True
            self._changed.notify_all()

    def close(self) -> None:
        """Leave the network; every peer sees Lost."""
        with self._network.lock:
            self._closed = True
            self._network.transports.pop(self._address, None)
            for peer in list(self._links.values()):
                peer._unlink(self)
            self._links.clear()
            self._changed.notify_all()

    def _link(self, peer: LocalTransport) -> None:
        replaced = self._links.get(peer.name)
        if replaced is not None and replaced is not peer:
            replaced._unlink(self)
        self._links[peer.name] = peer
        # A loss of the replaced incarnation would be taken for a loss of this one.
        self._inbox = deque(item for item in self._inbox if item != Lost(peer.name))

    def _unlink(self, peer: LocalTransport) -> None:
        if self._links.get(peer.name) is peer:
            del self._links[peer.name]
            self._deliver(Lost(peer.name))

    def _deliver(self, item: Received | Lost) -> None:
        self._inbox.append(item)
        self._changed.notify_all()
