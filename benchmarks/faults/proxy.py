"""A process that forwards bytes between workers and can reset, cut, delay or throttle a link.

Commands come as JSON lines on standard input and are answered on standard output; it ends with its
standard input. It knows nothing of frames but that a dialler's first ones end with its name.
"""

from __future__ import annotations

import asyncio
import json
import re
import secrets
import socket
import struct
import sys
from typing import Any

from router.transport.endpoints import open_socket, split_addresses

_NAME = re.compile(rb"((?:ingress|engine|stage|dispatcher|expert)-\d+)$")
_CHUNK = 256 << 10
_HARD = struct.pack("ii", 1, 0)
"""SO_LINGER of a close that sends a reset."""


class Connection:
    """One forwarded connection: `dialer` is known once its first bytes have passed."""

    def __init__(self, near: asyncio.StreamWriter, far: asyncio.StreamWriter, peer: str) -> None:
        self.ends = (near, far)
        self.dialer = ""
        self.peer = peer
        self.delay = 0.0
        self.rate = 0.0
        self.cut = False
        self.over = False

    @property
    def link(self) -> tuple[str, str]:
        """Who dialled whom."""
        return self.dialer, self.peer

    def reset(self) -> None:
        """Close both ends at once, whatever is under way."""
        self.over = True
        for writer in self.ends:
            sock = writer.get_extra_info("socket")
            if sock.family != socket.AF_UNIX:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _HARD)
            writer.transport.abort()

    async def forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Pass on one direction until its end, which ends the other one too."""
        try:
            while data := await reader.read(_CHUNK):
                if not self.dialer and writer is self.ends[1]:
                    name = _NAME.search(data)
                    self.dialer = name[1].decode() if name else ""
                if pause := self.delay + (len(data) / self.rate if self.rate else 0.0):
                    await asyncio.sleep(pause)
                if self.cut:
                    # Half of it must be out before the reset drops what is still queued.
                    writer.transport.set_write_buffer_limits(0)
                    writer.write(data[: len(data) // 2])
                    await writer.drain()
                    self.reset()
                    return
                writer.write(data)
                await writer.drain()
        except OSError:
            # A worker died: its side of the connection is gone, so is the other.
            self.reset()
            return
        for end in self.ends:
            end.close()


class Proxy:
    """Listeners in front of workers, and every connection through them."""

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self._open: set[Connection] = set()
        self._servers: list[asyncio.Server] = []

    async def answer(self, command: dict[str, Any]) -> object:
        """Carry out one command."""
        match command["do"]:
            case "front":
                return await self._front(command["peer"], command["address"])
            case "links":
                return sorted({c.link for c in self._open if c.dialer and not c.over})
            case "calm":
                for connection in self._open:
                    connection.delay = connection.rate = 0.0
                return len(self._open)
        hit = [c for c in self._open if c.link == tuple(command["link"]) and not c.over]
        for connection in hit:
            match command["do"]:
                case "reset":
                    connection.reset()
                case "cut":
                    connection.cut = True
                case "slow":
                    connection.delay, connection.rate = command["delay"], command["rate"]
        return len(hit)

    async def _front(self, peer: str, address: str) -> str:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await self._join(peer, address, reader, writer)

        if self._kind == "tcp":
            server = await asyncio.start_server(serve, "127.0.0.1", 0, limit=_CHUNK)
            announced = f"tcp:127.0.0.1:{server.sockets[0].getsockname()[1]}"
        else:
            name = f"conclave-proxy-{secrets.token_hex(12)}"
            listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            listener.bind(f"\0{name}")
            server = await asyncio.start_unix_server(serve, sock=listener, limit=_CHUNK)
            announced = f"unix:@{name}"
        self._servers.append(server)
        return announced

    async def _join(
        self,
        peer: str,
        address: str,
        near_in: asyncio.StreamReader,
        near_out: asyncio.StreamWriter,
    ) -> None:
        sock, target = open_socket(split_addresses(address)[0])
        try:
            await asyncio.get_running_loop().sock_connect(sock, target)
            far_in, far_out = await asyncio.open_connection(sock=sock, limit=_CHUNK)
        except OSError:
            # Nobody listens there any more: the dialler sees what it would have seen without us.
            sock.close()
            near_out.transport.abort()
            return
        connection = Connection(near_out, far_out, peer)
        self._open.add(connection)
        try:
            await asyncio.gather(
                connection.forward(near_in, far_out), connection.forward(far_in, near_out)
            )
        finally:
            self._open.discard(connection)


async def main(kind: str) -> None:
    """Answer commands until standard input ends."""
    commands = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(commands), sys.stdin.buffer)
    proxy = Proxy(kind)
    while line := await commands.readline():
        print(json.dumps(await proxy.answer(json.loads(line))), flush=True)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
