"""A client of OpenAI's completions that stamps every streamed event as it arrives."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from typing import Any

HOST = "127.0.0.1"
TIMEOUT = 300.0


def stream_all(port: int, bodies: Sequence[dict[str, Any]]) -> list[list[float]]:
    """All requests at once: seconds from the start to each token of each."""
    return asyncio.run(asyncio.wait_for(_stream_all(port, bodies), TIMEOUT))


async def _stream_all(port: int, bodies: Sequence[dict[str, Any]]) -> list[list[float]]:
    begin = time.perf_counter()
    return list(await asyncio.gather(*(_stream(port, body, begin) for body in bodies)))


async def _stream(port: int, body: dict[str, Any], begin: float) -> list[float]:
    reader, writer = await asyncio.open_connection(HOST, port, limit=1 << 20)
    content = json.dumps(body).encode()
    writer.write(
        f"POST /v1/completions HTTP/1.1\r\nHost: {HOST}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(content)}\r\nConnection: close\r\n\r\n".encode()
        + content
    )
    status = await reader.readline()
    if b" 200 " not in status:
        answer = await reader.read()
        raise RuntimeError(f"{status.decode().strip()}: {answer[-300:].decode(errors='replace')}")
    times: list[float] = []
    async for line in reader:
        if line.startswith(b"data: {"):
            choices = json.loads(line[6:]).get("choices")
            # A closing event without text brings no token.
            if choices and (choices[0].get("text") or choices[0].get("finish_reason") is None):
                times.append(time.perf_counter() - begin)
        elif line.startswith(b"data: [DONE]"):
            break
    writer.close()
    if not times:
        raise RuntimeError("its stream held no token")
    return times


def is_up(port: int) -> bool:
    """Whether the server lists its models."""

    async def ask() -> bool:
        reader, writer = await asyncio.open_connection(HOST, port)
        writer.write(
            f"GET /v1/models HTTP/1.1\r\nHost: {HOST}\r\nConnection: close\r\n\r\n".encode()
        )
        status = await reader.readline()
        writer.close()
        return b" 200 " in status

    try:
        return asyncio.run(asyncio.wait_for(ask(), 5))
    except (OSError, TimeoutError):
        return False
