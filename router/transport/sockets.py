"""Frames over Unix and TCP sockets: one single-threaded reactor per transport."""

from __future__ import annotations

import errno
import logging
import socket
import time
from functools import partial

from router.transport import endpoints
from router.transport.base import Frame, Lost, PeerLost, Received
from router.transport.connection import Connection, unsent
from router.transport.framing import frame_parts
from router.transport.handshake import Handshake, Identity
from router.transport.inbox import MAX_UNREAD_BYTES, Inbox
from router.transport.poller import Poller
from router.transport.wake_up import WakeUp

_log = logging.getLogger("conclave.transport")

HELLO_SECONDS = 5.0
"""How long an accepted connection may take for each step of its handshake."""
DIAL_SECONDS = 30.0
"""How long `connect` waits per step and endpoint: the peer may be busy computing."""
STALL_SECONDS = 60.0
"""A send to a peer that has read nothing for this long gives it up."""
MAX_STRANGERS = 256
"""Connections without handshake; one more drops the oldest."""
_DIAL_POLL_SECONDS = 0.002


class SocketTransport:
    """A named peer's sockets. Owned by one thread; only `wake` may be called from others.

    `secret` is shared by the group: who does not know it is refused. `tcp_host` is this node's
    address for peers of other nodes; without it only peers of this node can connect. For
    `spin_seconds` a `recv` looks for frames before it sleeps: only where a core is to spare.
    """

    def __init__(
        self,
        name: str,
        secret: str,
        *,
        tcp_host: str | None = None,
        hello_seconds: float = HELLO_SECONDS,
        dial_seconds: float = DIAL_SECONDS,
        stall_seconds: float = STALL_SECONDS,
        spin_seconds: float = 0.0,
        max_unread_bytes: int = MAX_UNREAD_BYTES,
    ) -> None:
        self._identity = Identity.create(name)
        self._secret = secret
        self._hello_seconds = hello_seconds
        self._dial_seconds = dial_seconds
        self._stall_seconds = stall_seconds
        self._spin_seconds = spin_seconds
        self._inbox = Inbox(max_unread_bytes)
        self._strangers: dict[Connection, None] = {}  # an ordered set, the oldest first
        # The first link is the one sent on, so that order holds when two peers dial each other.
        self._links: dict[str, list[Connection]] = {}
        self._closed = False
        self._wake_up = WakeUp()
        self._poller = Poller()
        self._poller.watch(self._wake_up.socket, self._wake_up.empty)
        self._listeners = [endpoints.listen_here()]
        if tcp_host is not None:
            self._listeners.append(endpoints.listen_tcp(tcp_host))
        for listener, _ in self._listeners:
            self._poller.watch(listener, partial(self._accept, listener))

    @property
    def address(self) -> str:
        """`unix:@…` and, with `tcp_host`, `,tcp:host:port`."""
        return ",".join(address for _, address in self._listeners)

    def connect(self, peer: str, address: str, patience: float | None = None) -> None:
        """Dial `peer`; replaces an earlier connection of that name. Raises PeerLost.

        When it returns, both ends can send. `patience`: instead of `dial_seconds`.
        """
        seconds = self._dial_seconds if patience is None else patience
        for endpoint in endpoints.split_addresses(address):
            try:
                self._dial(peer, endpoint, seconds)
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
            # What a dead peer sent before it died is still to be read: `recv` reports the loss.
            if error.errno not in (errno.EPIPE, errno.ECONNRESET):
                self._drop(connection, str(error))
            raise PeerLost(peer) from error
        if sent < total:
            self._send_rest(peer, connection, unsent(parts, sent))

    def recv(self, timeout: float | None) -> Received | Lost | None:
        """Next frame or loss; None after `timeout` seconds (0 polls) or after `wake`.

        Raises ConnectionError when this transport is closed.
        """
        if self._closed:
            raise ConnectionError(f"transport {self._identity.name} is closed")
        deadline: float | None = None
        remaining, spin = timeout, self._spin_seconds > 0
        while True:
            if self._wake_up.is_set:
                self._wake_up.take()
                return None
            if self._inbox:
                return self._inbox.take()
            if spin and remaining != 0:
                spin = False
                self._spin()
                continue
            if remaining is None:
                self._pump(None)
                continue
            if deadline is None:
                deadline = time.monotonic() + remaining
            elif remaining <= 0:
                return None
            self._pump(remaining)
            remaining = max(0.0, deadline - time.monotonic())

    def _spin(self) -> None:
        """Look for frames without sleeping, for as long as waking up would take."""
        until = time.monotonic() + self._spin_seconds
        while not self._inbox and not self._wake_up.is_set and time.monotonic() < until:
            self._poller.wait(0)

    def drop(self, peer: str, reason: str) -> None:
        """Break off with a peer that sends nonsense: `recv` reports it as Lost."""
        for connection in tuple(self._links.get(peer, ())):
            self._drop(connection, reason, malformed=True)

    def wake(self) -> None:
        """Make a blocked `recv` (or the next one) return None. Thread-safe."""
        self._wake_up.set()

    def close(self) -> None:
        """Close every connection and the listeners."""
        if self._closed:
            return
        self._closed = True
        for connection in self._strangers:
            self._unlink(connection)
        for links in self._links.values():
            for connection in links:
                self._unlink(connection)
        self._strangers.clear()
        self._links.clear()
        self._poller.close()
        for listener, _ in self._listeners:
            listener.close()
        self._wake_up.close()

    def _pump(self, timeout: float | None) -> None:
        """Wait for socket events, read what is there, drop strangers that are too slow."""
        if self._strangers:
            slowest = min(connection.deadline for connection in self._strangers)
            until = max(0.0, slowest - time.monotonic())
            timeout = until if timeout is None else min(timeout, until)
        self._poller.wait(timeout)
        if self._strangers:
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
            time.sleep(0.01)  # out of descriptors: the listener stays readable, do not spin
            return
        if len(self._strangers) >= MAX_STRANGERS:
            oldest = next((c for c in self._strangers if not c.dialed), None)
            if oldest is not None:
                self._drop(oldest, "too many connections without handshake")
        handshake = Handshake(self._identity, self._secret)
        self._admit(Connection(sock, handshake, dialed=False, patience=self._hello_seconds))

    def _admit(self, connection: Connection) -> None:
        self._strangers[connection] = None
        self._poller.watch(connection.sock, partial(self._readable, connection))

    def _dial(self, peer: str, endpoint: str, seconds: float) -> None:
        """Connect and shake hands, serving every other peer meanwhile. Raises OSError."""
        deadline = time.monotonic() + seconds
        sock, target = endpoints.open_socket(endpoint)
        try:
            while not endpoints.is_connected(code := sock.connect_ex(target)):
                if not endpoints.is_in_progress(code) or time.monotonic() > deadline:
                    raise OSError(code, "cannot connect")
                self._pump(_DIAL_POLL_SECONDS)
            handshake = Handshake(self._identity, self._secret, expected=peer)
            connection = Connection(sock, handshake, dialed=True, patience=seconds)
            connection.say_hello(handshake.opening)
        except OSError:
            sock.close()
            raise
        self._admit(connection)
        while connection.peer is None and not connection.closed:
            self._pump(None)
        if connection.peer is None:
            raise ConnectionError("no handshake")

    def _readable(self, connection: Connection) -> None:
        if connection.closed:  # dropped by an earlier event of the same poll
            return
        reader = connection.reader
        try:
            while connection.receive():
                while (frame := reader.next_frame()) is not None:
                    if connection.peer is not None:
                        self._inbox.put(connection.peer.name, frame)
                    elif (peer := connection.greet(frame)) is not None:
                        self._link(connection, peer)
                if not reader.in_body:
                    return
            self._drop(connection, "closed by peer")
        except BlockingIOError:
            return
        except OSError as error:
            self._drop(connection, str(error))
        except ValueError as error:  # MalformedFrame, HandshakeRefused, a name that is not UTF-8
            self._drop(connection, str(error), malformed=True)

    def _link(self, connection: Connection, peer: Identity) -> None:
        del self._strangers[connection]
        links = self._links.setdefault(peer.name, [])
        if any(link.peer != peer or link.dialed == connection.dialed for link in links):
            for link in links:
                self._unlink(link)
            links.clear()
        # Otherwise both dialed each other: each keeps sending on the link it had first.
        links.append(connection)
        self._inbox.forget_loss(peer.name)

    def _send_rest(
        self, peer: str, connection: Connection, parts: list[bytes | memoryview]
    ) -> None:
        sock = connection.sock
        # Those of now: what the peer dials meanwhile is whole.
        links = [connection, *self._links.get(peer, ())]
        try:
            self._poller.also_for_writing(sock, True)
            stalled_at = time.monotonic() + self._stall_seconds
            while parts:
                self._pump(max(0.0, stalled_at - time.monotonic()))
                if connection.closed:
                    raise PeerLost(peer)
                try:
                    parts = unsent(parts, sock.sendmsg(parts))
                    stalled_at = time.monotonic() + self._stall_seconds
                except BlockingIOError:
                    if time.monotonic() > stalled_at:
                        raise TimeoutError("peer does not read") from None
            self._poller.also_for_writing(sock, False)
        except BaseException as error:
            # Half a frame is out: nothing sensible can follow it.
            for link in links:
                self._drop(link, f"send interrupted: {error!r}")
            if isinstance(error, OSError):
                raise PeerLost(peer) from error
            raise

    def _unlink(self, connection: Connection) -> None:
        if not connection.closed:
            connection.closed = True
            self._poller.forget(connection.sock)
            connection.sock.close()

    def _drop(self, connection: Connection, reason: str, *, malformed: bool = False) -> None:
        """Close a connection; the last one of a known peer is reported as Lost."""
        if connection.closed:
            return
        self._unlink(connection)
        self._strangers.pop(connection, None)
        name = connection.peer.name if connection.peer is not None else "a stranger"
        level = logging.WARNING if malformed or connection.peer is None else logging.INFO
        _log.log(level, "%s: dropped connection of %s: %s", self._identity.name, name, reason)
        links = self._links.get(name, [])
        if connection.peer is not None and connection in links:
            links.remove(connection)
            if not links:
                del self._links[name]
                self._inbox.lose(name)
