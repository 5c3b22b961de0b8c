"""Frames over Unix and TCP sockets: one single-threaded reactor per transport."""

from __future__ import annotations

import logging
import selectors
import socket
import threading
import time
from collections import deque
from functools import partial

from router.transport import endpoints
from router.transport.base import Frame, FrameKind, Header, Lost, PeerLost, Received
from router.transport.framing import MAX_FRAME_BYTES, STAGING_BYTES, FrameReader, frame_parts
from router.transport.handshake import Handshake, HandshakeRefused, Identity

_log = logging.getLogger("conclave.transport")

HELLO_BYTES = 2 << 10
"""Largest frame accepted from a connection that has not proved itself."""
HELLO_SECONDS = 5.0
"""How long an accepted connection may take to prove itself."""
DIAL_SECONDS = 30.0
"""How long `connect` waits per endpoint: the peer may be busy computing."""
STALL_SECONDS = 60.0
"""A send to a peer that has read nothing for this long gives it up."""
MAX_STRANGERS = 256
_DIAL_POLL_SECONDS = 0.002


class _Connection:
    """One socket; `peer` is None until its handshake is done."""

    def __init__(self, sock: socket.socket, handshake: Handshake, *, dialed: bool) -> None:
        self.sock = sock
        self.reader = FrameReader(2 * HELLO_BYTES, HELLO_BYTES)
        self.handshake = handshake
        self.dialed = dialed
        self.deadline = time.monotonic() + HELLO_SECONDS
        self.peer: Identity | None = None
        self.closed = False


class SocketTransport:
    """A named peer's sockets. Owned by one thread; only `wake` may be called from others.

    `secret` is shared by the group: who does not know it is refused. `tcp_host` is this node's
    address for peers of other nodes; without it only peers of this node can connect.
    """

    def __init__(
        self,
        name: str,
        secret: str,
        *,
        tcp_host: str | None = None,
        dial_seconds: float = DIAL_SECONDS,
        stall_seconds: float = STALL_SECONDS,
    ) -> None:
        self._identity = Identity.create(name)
        self._secret = secret
        self._dial_seconds = dial_seconds
        self._stall_seconds = stall_seconds
        self._inbox: deque[Received | Lost] = deque()
        self._strangers: dict[_Connection, None] = {}
        # The first link is the one sent on, so that order holds when two peers dial each other.
        self._links: dict[str, list[_Connection]] = {}
        self._closed = False
        self._woken = False
        self._wake_lock = threading.Lock()
        self._wake_reader, self._wake_writer = socket.socketpair()
        self._wake_reader.setblocking(False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._wake_reader, selectors.EVENT_READ, _nothing)
        self._listeners = [endpoints.listen_here()]
        if tcp_host is not None:
            self._listeners.append(endpoints.listen_tcp(tcp_host))
        for listener, _ in self._listeners:
            self._selector.register(listener, selectors.EVENT_READ, partial(self._accept, listener))

    @property
    def address(self) -> str:
        """`unix:@…` and, with `tcp_host`, `,tcp:host:port`."""
        return ",".join(address for _, address in self._listeners)

    def connect(self, peer: str, address: str) -> None:
        """Dial `peer`; replaces an earlier connection of that name. Raises PeerLost.

        When it returns, both ends can send.
        """
        for endpoint in endpoints.split_addresses(address):
            try:
                self._dial(peer, endpoint)
                return
            except OSError as error:
                _log.info("%s: no %s at %s: %s", self._identity.name, peer, endpoint, error)
        raise PeerLost(peer)

    def send(self, peer: str, frame: Frame) -> None:
        """Write one frame; while the socket is full, frames of all peers are read.

        Raises PeerLost when the peer is unknown, gone or stalled.
        """
        links = self._links.get(peer)
        if not links:
            raise PeerLost(peer)
        connection = links[0]
        parts, total = frame_parts(frame)
        try:
            sent = connection.sock.sendmsg(parts)
        except BlockingIOError:
            sent = 0
        except OSError as error:
            # What the peer sent before it died is still to be read: `recv` reports the loss.
            raise PeerLost(peer) from error
        if sent < total:
            self._send_rest(peer, connection, parts, sent)

    def recv(self, timeout: float | None) -> Received | Lost | None:
        """Next frame or loss; None after `timeout` seconds (0 polls) or after `wake`."""
        if self._closed:
            raise ConnectionError(f"transport {self._identity.name} is closed")
        deadline = None if timeout is None else time.monotonic() + timeout
        remaining = timeout
        while True:
            if self._woken:
                self._forget_wake()
                return None
            if self._inbox:
                return self._inbox.popleft()
            if remaining is not None and remaining < 0:
                return None
            self._pump(remaining)
            if deadline is not None:
                # Negative once the time is over, also for 0: one more look at the inbox.
                remaining = deadline - time.monotonic() or -1.0

    def wake(self) -> None:
        """Make a blocked `recv` (or the next one) return None. Thread-safe."""
        with self._wake_lock:
            if not self._woken and not self._closed:
                self._woken = True
                self._wake_writer.send(b"\0")

    def close(self) -> None:
        """Close every connection and the listeners."""
        if self._closed:
            return
        with self._wake_lock:
            self._closed = True
        for connection in [*self._strangers, *sum(self._links.values(), [])]:
            self._unlink(connection)
        self._links.clear()
        self._selector.close()
        for listener, _ in self._listeners:
            listener.close()
        self._wake_reader.close()
        self._wake_writer.close()

    def _forget_wake(self) -> None:
        with self._wake_lock:
            self._woken = False
            self._wake_reader.recv(1)

    def _pump(self, timeout: float | None) -> None:
        """Wait for socket events, read what is there, drop strangers that are too slow."""
        if self._strangers:
            slowest = next(iter(self._strangers)).deadline - time.monotonic()
            timeout = max(0.0, slowest if timeout is None else min(timeout, slowest))
        ready = self._selector.select(timeout)
        for key, _ in ready:
            key.data()
        if self._strangers and not ready:
            self._expire_strangers()

    def _expire_strangers(self) -> None:
        now = time.monotonic()
        for connection in [c for c in self._strangers if c.deadline <= now]:
            self._drop(connection, "no handshake in time")

    def _accept(self, listener: socket.socket) -> None:
        try:
            sock = endpoints.accept(listener)
        except BlockingIOError:
            return
        except OSError as error:
            _log.warning("%s: cannot accept: %s", self._identity.name, error)
            time.sleep(0.01)  # out of descriptors: the listener stays readable
            return
        if len(self._strangers) >= MAX_STRANGERS:
            self._drop(next(iter(self._strangers)), "too many connections without handshake")
        self._admit(sock, Handshake(self._identity, self._secret), dialed=False)

    def _admit(self, sock: socket.socket, handshake: Handshake, *, dialed: bool) -> _Connection:
        connection = _Connection(sock, handshake, dialed=dialed)
        if dialed:
            connection.deadline = time.monotonic() + self._dial_seconds
        self._strangers[connection] = None
        self._selector.register(sock, selectors.EVENT_READ, partial(self._readable, connection))
        return connection

    def _dial(self, peer: str, endpoint: str) -> None:
        """Connect and shake hands, serving every other peer meanwhile. Raises OSError."""
        deadline = time.monotonic() + self._dial_seconds
        sock, target = endpoints.open_socket(endpoint)
        try:
            while not endpoints.is_connected(code := sock.connect_ex(target)):
                if not endpoints.is_in_progress(code) or time.monotonic() > deadline:
                    raise OSError(code, "cannot connect")
                self._pump(_DIAL_POLL_SECONDS)
        except OSError:
            sock.close()
            raise
        handshake = Handshake(self._identity, self._secret, expected=peer)
        connection = self._admit(sock, handshake, dialed=True)
        self._say_hello(connection, handshake.opening)
        while connection.peer is None and not connection.closed:
            self._pump(self._dial_seconds)
        if connection.peer is None:
            raise ConnectionError("no handshake")

    def _say_hello(self, connection: _Connection, payload: bytes) -> None:
        # A fresh socket has room for this: anything but one whole write is a failure.
        parts, total = frame_parts(Frame(Header(kind=FrameKind.HELLO), payload))
        try:
            if connection.sock.sendmsg(parts) != total:
                self._drop(connection, "handshake not written")
        except OSError as error:
            self._drop(connection, str(error))

    def _readable(self, connection: _Connection) -> None:
        if connection.closed:  # dropped by an earlier event of the same poll
            return
        try:
            num_bytes = connection.sock.recv_into(connection.reader.space())
        except BlockingIOError:
            return
        except OSError as error:
            self._drop(connection, str(error))
            return
        if not num_bytes:
            self._drop(connection, "closed by peer")
            return
        connection.reader.advance(num_bytes)
        try:
            while not connection.closed and (frame := connection.reader.next_frame()) is not None:
                if connection.peer is None:
                    self._greet(connection, frame)
                else:
                    self._inbox.append(Received(connection.peer.name, frame))
        except ValueError as error:  # MalformedFrame, HandshakeRefused, a name that is not UTF-8
            self._drop(connection, str(error), malformed=True)

    def _greet(self, connection: _Connection, frame: Frame) -> None:
        if frame.header.kind is not FrameKind.HELLO or frame.buffers:
            raise HandshakeRefused("the first frames must be HELLO")
        reply = connection.handshake.answer(frame.meta)
        if reply is not None:
            self._say_hello(connection, reply)
        peer = connection.handshake.peer
        if peer is None or connection.closed:
            return
        connection.peer = peer
        del self._strangers[connection]
        connection.reader.widen(STAGING_BYTES, MAX_FRAME_BYTES)
        self._link(peer, connection)

    def _link(self, peer: Identity, connection: _Connection) -> None:
        links = self._links.setdefault(peer.name, [])
        if any(link.peer != peer or link.dialed == connection.dialed for link in links):
            for link in links:
                self._unlink(link)
            links.clear()
        # Otherwise both dialed each other at once: each keeps sending on the link it had first.
        links.append(connection)
        self._inbox = deque(item for item in self._inbox if item != Lost(peer.name))

    def _send_rest(
        self, peer: str, connection: _Connection, parts: list[bytes | memoryview], sent: int
    ) -> None:
        sock, data = connection.sock, partial(self._readable, connection)
        both = selectors.EVENT_READ | selectors.EVENT_WRITE
        self._selector.modify(sock, both, data)
        stalled_at = time.monotonic() + self._stall_seconds
        try:
            while parts := _skip(parts, sent):
                self._pump(max(0.0, stalled_at - time.monotonic()))
                if connection.closed:
                    raise PeerLost(peer)
                try:
                    sent = sock.sendmsg(parts)
                    stalled_at = time.monotonic() + self._stall_seconds
                except BlockingIOError:
                    sent = 0
                    if time.monotonic() > stalled_at:
                        raise PeerLost(peer) from None
            self._selector.modify(sock, selectors.EVENT_READ, data)
        except BaseException as error:
            # Half a frame is out: nothing sensible can follow it on this connection.
            self._drop(connection, f"send interrupted: {error!r}")
            raise PeerLost(peer) from error if isinstance(error, OSError) else error

    def _unlink(self, connection: _Connection) -> None:
        if not connection.closed:
            connection.closed = True
            self._selector.unregister(connection.sock)
            connection.sock.close()

    def _drop(self, connection: _Connection, reason: str, *, malformed: bool = False) -> None:
        """Close a connection; the last one of a known peer is reported as Lost."""
        if connection.closed:
            return
        self._unlink(connection)
        peer = connection.peer
        name = peer.name if peer is not None else "a stranger"
        level = logging.WARNING if malformed or peer is None else logging.INFO
        _log.log(level, "%s: dropped connection of %s: %s", self._identity.name, name, reason)
        self._strangers.pop(connection, None)
        if peer is not None and connection in (links := self._links[peer.name]):
            links.remove(connection)
            if not links:
                del self._links[peer.name]
                self._inbox.append(Lost(peer.name))


def _nothing() -> None:
    """The wake socket is read by `recv`, which sees the flag."""


def _skip(parts: list[bytes | memoryview], sent: int) -> list[bytes | memoryview]:
    """What is left of `parts` after their first `sent` bytes."""
    for idx, part in enumerate(parts):
        if sent < len(part):
            return [memoryview(part)[sent:], *parts[idx + 1 :]]
        sent -= len(part)
    return []
