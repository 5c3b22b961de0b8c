"""Streams over a real socket, and what the engine computes meanwhile."""

from __future__ import annotations

import asyncio
import json
import socket
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import uvicorn

from deploy.http_api import build_api
from deploy.service import ApiService
from router.engine import EngineCore
from router.step import StepPlan
from shards.group_loop import GroupLoop


@asynccontextmanager
async def listening(service: ApiService, send_buffer: int | None = None) -> AsyncIterator[int]:
    """The API on a port of this machine; `send_buffer` bytes are what the kernel takes at once."""
    listener = socket.socket()
    if send_buffer is not None:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
    listener.bind(("127.0.0.1", 0))
    listener.listen(512)
    server = uvicorn.Server(uvicorn.Config(build_api(service), log_level="error", lifespan="off"))
    running = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        yield int(listener.getsockname()[1])
    finally:
        server.should_exit = True
        await running


class Connection:
    """One POST on a connection of its own, read only when asked to."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self._writer = writer

    @classmethod
    async def post(
        cls, port: int, path: str, body: Any, receive_buffer: int | None = None
    ) -> Connection:
        """Send the request and nothing else."""
        sock = socket.socket()
        if receive_buffer is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", port))
        limit = receive_buffer or 1 << 16
        reader, writer = await asyncio.open_connection(sock=sock, limit=limit)
        data = json.dumps(body).encode()
        writer.write(f"POST {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n".encode())
        writer.write(f"Content-Length: {len(data)}\r\n\r\n".encode() + data)
        return cls(reader, writer)

    async def lines(self) -> AsyncIterator[bytes]:
        """Every line that holds an event or a comment."""
        while line := await self.reader.readline():
            if line.startswith((b"data: ", b": ")):
                yield line.rstrip()

    async def events(self) -> list[Any]:
        """All chunks up to [DONE], which must be there."""
        lines = [line async for line in self.lines() if line.startswith(b"data: ")]
        assert lines[-1] == b"data: [DONE]", lines[-1:]
        return [json.loads(line[6:]) for line in lines[:-1]]

    def leave(self) -> None:
        """Close it without a word."""
        self._writer.transport.abort()


_ON_THE_WAY = 30
"""Steps in which an abort must have reached the engine: threads of one process take turns."""


class Steps:
    """Counts steps of each sequence of engines in this process: until the ingress dropped it, while
    the engine did not know yet, and after it did."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.before: Counter[int] = Counter()
        self.meanwhile: Counter[int] = Counter()
        self.after: Counter[int] = Counter()
        self.dropped: set[int] = set()
        self.aborted: set[int] = set()
        plain_schedule, plain_abort = EngineCore.schedule, EngineCore.abort
        plain_drop = GroupLoop.drop

        def schedule(core: EngineCore) -> StepPlan | None:
            plan = plain_schedule(core)
            for each in plan.scheduled if plan is not None else ():
                self._counter(each.seq_id)[each.seq_id] += 1
            return plan

        def abort(core: EngineCore, seq_id: int) -> None:
            self.aborted.add(seq_id)
            plain_abort(core, seq_id)

        def drop(loop: GroupLoop, seq_id: int) -> None:
            self.dropped.add(seq_id)
            plain_drop(loop, seq_id)

        monkeypatch.setattr(EngineCore, "schedule", schedule)
        monkeypatch.setattr(EngineCore, "abort", abort)
        monkeypatch.setattr(GroupLoop, "drop", drop)

    def _counter(self, seq_id: int) -> Counter[int]:
        if seq_id in self.aborted:
            return self.after
        return self.meanwhile if seq_id in self.dropped else self.before

    def assert_aborted_within_a_step(self, num_sequences: int, max_tokens: int) -> None:
        """All had begun, were dropped on their way, and got no step once the engine knew."""
        assert len(self.before) == num_sequences
        assert self.aborted >= set(self.before)
        assert all(0 < steps < max_tokens for steps in self.before.values())
        assert all(steps <= _ON_THE_WAY for steps in self.meanwhile.values()), self.meanwhile
        assert not self.after


async def at_rest(service: ApiService) -> None:
    """Wait until the engine has no sequence left."""
    async with asyncio.timeout(20):
        while service._client.load.running or service._client.load.waiting:
            await asyncio.sleep(0.01)
