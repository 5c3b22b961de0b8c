"""Socket addresses as text: `unix:@name` (abstract, leaves no file) and `tcp:host:port`."""

from __future__ import annotations

import errno
import secrets
import socket
import sys

_BACKLOG = 512
_SOCKET_BUFFER = 1 << 20
_KEEPALIVE = (("TCP_KEEPIDLE", 5), ("TCP_KEEPINTVL", 2), ("TCP_KEEPCNT", 3))

Target = str | tuple[str, int]


def listen_here() -> tuple[socket.socket, str]:
    """A listener for peers of this node: abstract Unix on Linux, loopback TCP elsewhere."""
    if sys.platform != "linux":
        return listen_tcp("127.0.0.1")
    name = f"conclave-{secrets.token_hex(16)}"
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(f"\0{name}")
    return _listening(listener), f"unix:@{name}"


def listen_tcp(host: str) -> tuple[socket.socket, str]:
    """A listener on an ephemeral port of `host`, the address under which others dial it."""
    if host in ("", "0.0.0.0", "::"):
        raise ValueError(f"tcp_host={host!r}: allowed an address of this node that others can dial")
    family = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0][0]
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.bind((host, 0))
    return _listening(listener), f"tcp:{host}:{listener.getsockname()[1]}"


def _listening(listener: socket.socket) -> socket.socket:
    listener.setblocking(False)
    listener.listen(_BACKLOG)
    return listener


def split_addresses(address: str) -> list[str]:
    """The comma-joined endpoints of an address, Unix ones first."""
    return sorted(address.split(","), key=lambda endpoint: not endpoint.startswith("unix:"))


def tcp_host_of(address: str) -> str | None:
    """The host of an address's TCP endpoint; None when it has none."""
    for endpoint in address.split(","):
        kind, _, rest = endpoint.partition(":")
        if kind == "tcp":
            return rest.rpartition(":")[0]
    return None


def open_socket(endpoint: str) -> tuple[socket.socket, Target]:
    """An unconnected, non-blocking socket for `endpoint` and what to connect it to.

    Raises OSError when this platform or node cannot reach such an endpoint.
    """
    kind, _, rest = endpoint.partition(":")
    if kind == "unix" and rest.startswith("@") and sys.platform == "linux":
        return _tuned(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)), f"\0{rest[1:]}"
    host, _, port = rest.rpartition(":")
    if kind == "tcp" and host and port.isdecimal():
        found = socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM)[0]
        return _tuned(socket.socket(found[0], socket.SOCK_STREAM)), (host, int(port))
    raise OSError(
        errno.EADDRNOTAVAIL, f"cannot dial {endpoint!r}: allowed unix:@name, tcp:host:port"
    )


def accept(listener: socket.socket) -> socket.socket:
    """The next waiting connection, non-blocking. Raises BlockingIOError when there is none."""
    return _tuned(listener.accept()[0])


def is_in_progress(code: int) -> bool:
    """Whether `connect_ex` may succeed later (EAGAIN: a Unix listener's backlog is full)."""
    return code in (errno.EINPROGRESS, errno.EALREADY, errno.EAGAIN)


def is_connected(code: int) -> bool:
    """Whether `connect_ex` says that the socket is connected."""
    return code in (0, errno.EISCONN)


def _tuned(sock: socket.socket) -> socket.socket:
    sock.setblocking(False)
    if sock.family == socket.AF_UNIX:
        # TCP sizes its own buffers; a fixed size would turn that off.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SOCKET_BUFFER)
        return sock
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in _KEEPALIVE:
        # A node that lost power sends no reset: keepalive finds it (names differ by platform).
        if hasattr(socket, option):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
    return sock
