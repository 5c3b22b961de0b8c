"""What hostile and clumsy clients do, many times over: afterwards everything is as it was."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import socket
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import pytest

from deploy.demo import nano_checkpoint
from deploy.http_options import HttpOptions
from tests.deploy.conftest import Api, ScriptedClient, running_service
from tests.deploy.http_client import is_openai_error
from tests.deploy.test_openai_client import served

BODY_TIMEOUT_S = 0.5
PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/classify")
MiB = 2**20


class Level:
    """What this process holds: tasks, file descriptors, live sequences, memory."""

    def __init__(self, service: Any) -> None:
        gc.collect()
        self.tasks = len(asyncio.all_tasks())
        self.descriptors = len(os.listdir("/proc/self/fd"))
        self.live = service._admission.live
        load = service._client.load
        self.engine = load.running + load.waiting
        with open("/proc/self/statm") as file:
            self.bytes = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


async def settled(service: Any, before: Level) -> Level:
    """The level once everything has had time to end."""
    for _ in range(200):
        now = Level(service)
        idle = (now.live, now.engine) == (0, 0) and now.tasks <= before.tasks
        if idle and now.descriptors <= before.descriptors:
            break
        await asyncio.sleep(0.05)
    return Level(service)


class Server:
    """A real model behind a real web server, with raw access to its port."""

    def __init__(self, service: Any, base: str) -> None:
        self.service = service
        self.url = base.removesuffix("/v1")
        self.port = int(self.url.rpartition(":")[2])
        self.http = httpx.AsyncClient(base_url=self.url, timeout=60)

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection("127.0.0.1", self.port)

    async def says_hello(self) -> None:
        body = {"prompt": [5, 6, 7], "max_tokens": 3, "temperature": 0}
        response = await self.http.post("/v1/completions", json=body)
        assert response.status_code == 200, response.text
        assert response.json()["usage"]["completion_tokens"] <= 3
        assert (await self.http.get("/health")).json() == {"state": "ready"}


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    folder = nano_checkpoint("nano-jamba")
    with running_service(folder, executor="local", max_model_len=512, max_num_seqs=8) as service:
        options = HttpOptions(body_timeout_s=BODY_TIMEOUT_S)
        # `served` asks for an application only.
        api = Api(service._model, ScriptedClient(lambda *_: []), service)
        async with served(api, options=options) as base:
            found = Server(service, base)
            await found.says_hello()
            try:
                yield found
            finally:
                await found.http.aclose()


def request_head(path: str, length: int) -> bytes:
    return (
        f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        f"Content-Length: {length}\r\n\r\n"
    ).encode()


async def leave(server: Server, number: int) -> None:
    """One client that goes away, in one of several ways."""
    stream = number % 2 == 0
    body = json.dumps({"prompt": [5, 6], "max_tokens": 400, "ignore_eos": True, "stream": stream})
    reader, writer = await server.connect()
    head = request_head("/v1/completions", len(body))
    how = number % 5
    if how == 0:
        writer.write(head[: len(head) // 2])
    elif how == 1:
        writer.write(head + body[:7].encode())
    else:
        writer.write(head + body.encode())
    await writer.drain()
    if how == 3 and stream:
        await reader.readuntil(b"data: ")
    elif how == 4:
        await asyncio.sleep(0.005)
    if number % 3 == 0:  # an abrupt end instead of a polite one
        sock = writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
    writer.close()
    await asyncio.gather(writer.wait_closed(), return_exceptions=True)


async def check_back_to_level(
    server: Server, trouble: Callable[[], Any], warm_up: Callable[[], Any], most: int
) -> None:
    """Run `trouble`; nothing of it stays, but for `most` bytes beyond what a warm-up takes."""
    await warm_up()
    before = await settled(server.service, Level(server.service))
    await trouble()
    await server.says_hello()
    after = await settled(server.service, before)
    assert (after.live, after.engine) == (0, 0)
    assert after.tasks <= before.tasks
    assert after.descriptors <= before.descriptors
    assert after.bytes - before.bytes < most, f"{(after.bytes - before.bytes) / MiB:.1f} MiB"


async def test_a_thousand_clients_that_leave(server: Server) -> None:
    async def crowd(count: int) -> None:
        for number in range(count):
            await leave(server, number)

    await check_back_to_level(server, lambda: crowd(1000), lambda: crowd(50), 48 * MiB)


async def test_bodies_that_trickle(server: Server) -> None:
    """Each is answered 408 and its connection closed, while others are served."""

    async def trickle() -> bytes:
        reader, writer = await server.connect()
        writer.write(request_head("/v1/completions", 10_000))
        for _ in range(6):
            writer.write(b" ")
            await asyncio.sleep(BODY_TIMEOUT_S / 10)
        # Silent from here: a byte that crosses the answer on its way resets the connection.
        answer = await reader.read()
        writer.close()
        return answer

    async def crowd(count: int) -> None:
        slow = asyncio.gather(*(trickle() for _ in range(count)))
        await server.says_hello()
        for answer in await slow:
            assert answer.startswith(b"HTTP/1.1 408"), answer[:100]
            assert is_openai_error(json.loads(answer.partition(b"\r\n\r\n")[2]))

    await check_back_to_level(server, lambda: crowd(100), lambda: crowd(5), 16 * MiB)


async def test_heads_that_never_end(server: Server) -> None:
    async def crowd(count: int) -> None:
        streams = [await server.connect() for _ in range(count)]
        for _, writer in streams:
            writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nX-Slow: ")
            await writer.drain()
        await server.says_hello()
        for _, writer in streams:
            writer.close()
            await writer.wait_closed()

    await check_back_to_level(server, lambda: crowd(200), lambda: crowd(5), 16 * MiB)


def large_bodies() -> list[tuple[bytes, set[int]]]:
    """Bodies of 10 MB and what they may be answered with."""
    words = "some words and more " * 500_000
    return [
        (json.dumps({"prompt": words}).encode(), {400}),
        (json.dumps({"prompt": " " * 10**7}).encode(), {400}),
        (json.dumps({"messages": [{"role": "user", "content": words}]}).encode(), {400}),
        (json.dumps({"input": words, "prompt": [5] * 10**6}).encode(), {400}),
        (json.dumps({"prompt": "x", "stop": ["y" * 1000] * 10_000}).encode(), {400}),
        (json.dumps({"prompt": [["x"]] * 10**6}).encode(), {400}),
        (json.dumps({"prompt": [1e300] * 10**6}).encode(), {400}),
        (json.dumps({f"f{i}": i for i in range(500_000)}).encode(), {400}),
        (b"[" * 10**7, {400}),
        (b'{"a":' * 10**6, {400}),
        (b"\xff" * 10**7, {400}),
        (b'{"prompt": "' + b"\xed\xa0\x80" * 10**6 + b'"}', {400}),
        (b'{"seed": ' + b"9" * 10**7 + b"}", {400}),
        (b" " * (17 * 10**6), {413}),
    ]


async def test_large_and_broken_bodies(server: Server) -> None:
    async def crowd(rounds: int) -> None:
        for _ in range(rounds):
            for body, statuses in large_bodies():
                for path in PATHS:
                    headers = {"content-type": "application/json"}
                    response = await server.http.post(path, content=body, headers=headers)
                    assert response.status_code in statuses, (path, body[:40], response.text)
                    assert is_openai_error(response.json())
                    assert len(response.content) < 4000

    await check_back_to_level(server, lambda: crowd(1), lambda: crowd(1), 64 * MiB)
