"""How soon a server that is full says so, beside a bare Ray Serve endpoint that answers at once.

.venv/bin/python -m benchmarks.refusals --burst 256 --rounds 5

Our server, on nano-phimoe, is first filled with streams that do not end, so that the engine is at
work. Then so many requests are sent at once, each over a connection that is open already, and all
but none of them get 429. The bare endpoint is asked the same way, before and while our engine
works: what it takes is Serve's own proxy, and the cores that are shared.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import time
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

from benchmarks.bare_endpoint import bare_deployment
from benchmarks.streaming import MODEL

_WAITING_PER_RUNNING = 16
Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


def request(method: str, path: str, body: dict[str, Any] | None) -> bytes:
    """HTTP/1.1, as bytes."""
    data = b"" if body is None else json.dumps(body).encode()
    head = f"{method} {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data


async def ask(connection: Connection, raw: bytes) -> tuple[int, float]:
    """Status and seconds of one answer."""
    reader, writer = connection
    began = time.perf_counter()
    writer.write(raw)
    head = await reader.readuntil(b"\r\n\r\n")
    seconds = time.perf_counter() - began
    return int(head.split(b" ", 2)[1]), seconds


async def burst(port: int, raw: bytes, count: int) -> list[tuple[int, float]]:
    """All at once."""
    connections = [await asyncio.open_connection("127.0.0.1", port) for _ in range(count)]
    try:
        return list(await asyncio.gather(*(ask(each, raw) for each in connections)))
    finally:
        for _, writer in connections:
            writer.close()


@asynccontextmanager
async def filled(port: int, places: int) -> Any:
    """Streams that run, or wait to, for as long as the block lasts."""
    body = {"prompt": [5, 6, 7, 8], "max_tokens": 400, "ignore_eos": True, "stream": True}
    connections: list[Connection] = []
    ended = asyncio.Event()

    async def hold() -> None:
        while not ended.is_set():
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            connections.append((reader, writer))
            writer.write(request("POST", "/v1/completions", body))
            while not ended.is_set() and b"[DONE]" not in (await reader.read(1 << 16) or b"[DONE]"):
                pass
            writer.close()

    tasks = [asyncio.create_task(hold()) for _ in range(places)]
    await asyncio.sleep(2)
    try:
        yield
    finally:
        ended.set()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for _, writer in connections:
            writer.close()
        await asyncio.sleep(1)


def show(name: str, answers: list[tuple[int, float]]) -> None:
    """One row of the table: what was answered with the status that most have."""
    statuses = [status for status, _ in answers]
    usual = statistics.mode(statuses)
    times = sorted(1e3 * seconds for status, seconds in answers if status == usual)
    cells = " | ".join(f"{times[int(share * (len(times) - 1))]:.1f}" for share in (0.5, 0.99, 1))
    print(f"| {name} | {usual} | {len(times)} of {len(answers)} | {cells} |", flush=True)


async def measure(options: argparse.Namespace) -> None:
    """All rounds."""
    ours = request("POST", "/v1/completions", {"prompt": "some words", "max_tokens": 5})
    bare = request("GET", "/bare/ready", None)
    print("| who | status | answers | median ms | p99 | longest |")
    print("|---|---|---|---|---|---|")
    await burst(options.port, bare, options.burst)
    for state in ("idle", "full"):
        found: dict[str, list[tuple[int, float]]] = {}
        async with AsyncExitStack() as stack:
            if state == "full":
                places = options.seats * (1 + _WAITING_PER_RUNNING)
                await stack.enter_async_context(filled(options.port, places))
            for _ in range(options.rounds):
                for name, raw in (("bare Serve", bare), ("conclave", ours)):
                    answers = await burst(options.port, raw, options.burst)
                    found.setdefault(name, []).extend(answers)
                    await asyncio.sleep(0.5)
        for name, answers in found.items():
            show(f"{name}, {state}", answers)


def main() -> None:
    """Parse arguments, start both applications, print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--burst", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seats", type=int, default=4, help="--max-num-seqs of our server")
    parser.add_argument("--port", type=int, default=18432)
    options = parser.parse_args()
    from deploy.local_ray import ray_session

    with ray_session(num_cpus=4):
        from ray import serve  # it reads the session's environment

        from deploy.app import build

        serve.start(http_options={"host": "127.0.0.1", "port": options.port})
        served = build({"model": MODEL, "max_num_seqs": options.seats})
        serve.run(served, name="conclave", route_prefix="/")
        serve.run(bare_deployment(2 * options.burst).bind(), name="bare", route_prefix="/bare")
        asyncio.run(measure(options))


if __name__ == "__main__":
    main()
