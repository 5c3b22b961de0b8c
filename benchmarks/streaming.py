"""Processor time of the ingress per streamed token, beside bare endpoints that yield the same.

.venv/bin/python -m benchmarks.streaming --streams 1 64 256 --tokens 64 --output results.json

Three servers take turns: ours on nano-phimoe, a Ray Serve deployment that yields the bytes of one
of our streams at our own pace, and the same endpoint in uvicorn without Ray. Counted is the time
that the answering process itself spends (user and system), all of its threads; of ours that
includes detokenizing, the journal and the watch over the workers. A client that only counts events
reads all streams on loopback.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.request import urlopen

from benchmarks.bare_endpoint import EVENTS, bare_deployment

MODEL = "nano-phimoe"


@dataclass(frozen=True, slots=True)
class Server:
    """Who answers: a port, a path, and the process whose time counts."""

    name: str
    port: int
    path: str
    pid: int


@dataclass(frozen=True, slots=True)
class Cost:
    """Of one round: microseconds of the server's time per token, and how the round went."""

    server: str
    streams: int
    tokens: int
    cpu_us_per_token: float
    seconds: float


def cpu_seconds(pid: int) -> float:
    """User and system time of a process and all its threads."""
    # Linux: the clock that counts the process with this id, in nanoseconds.
    return time.clock_gettime((~pid << 3) | 2)


def process_titled(title: str) -> int:
    """The process whose title begins so; Ray names its workers."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if (entry / "cmdline").read_bytes().startswith(title.encode()):
                    return int(entry.name)
            except OSError:
                continue  # it has ended meanwhile
    raise SystemExit(f"no process is called {title}")


async def read_stream(server: Server, body: dict[str, Any]) -> list[bytes]:
    """The events of one streamed answer; fails unless it ends as it should."""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    data = json.dumps(body).encode()
    head = f"POST {server.path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    writer.write(head.encode() + data)
    answer = b"".join([piece async for piece in _pieces(reader)])
    writer.close()
    assert answer.startswith(b"HTTP/1.1 200"), answer[:500]
    events = [line for line in answer.split(b"\n") if line.startswith(b"data: ")]
    assert events[-1].strip() == b"data: [DONE]", answer[-500:]
    return [line.rstrip() + b"\n\n" for line in events]


async def _pieces(reader: asyncio.StreamReader) -> Any:
    while piece := await reader.read(1 << 16):
        yield piece


async def measure(server: Server, streams: int, tokens: int, gap_s: float) -> Cost:
    """One round: all streams at once."""
    body = {"prompt": [5, 6, 7, 8], "max_tokens": tokens, "ignore_eos": True, "temperature": 0}
    body |= {"stream": True, "gap_s": gap_s} if server.name != "conclave" else {"stream": True}
    before, began = cpu_seconds(server.pid), time.perf_counter()
    answers = await asyncio.gather(*(read_stream(server, body) for _ in range(streams)))
    seconds = time.perf_counter() - began
    spent = cpu_seconds(server.pid) - before
    assert {len(events) for events in answers} == {len(answers[0])}
    return Cost(server.name, streams, tokens, 1e6 * spent / (streams * tokens), seconds)


def rest_us(server: Server, seconds: float = 3.0) -> float:
    """Microseconds per second that a process spends when nobody asks."""
    time.sleep(1)
    before = cpu_seconds(server.pid)
    time.sleep(seconds)
    return 1e6 * (cpu_seconds(server.pid) - before) / seconds


@contextmanager
def bare_uvicorn(port: int) -> Iterator[Server]:
    """The bare endpoint in a process of its own, without Ray."""
    command = [sys.executable, "-m", "benchmarks.bare_endpoint", str(port)]
    process = subprocess.Popen(command)
    try:
        for _ in range(100):
            try:
                urlopen(f"http://127.0.0.1:{port}/ready").close()
                break
            except OSError:
                time.sleep(0.1)
        yield Server("uvicorn", port, "/", process.pid)
    finally:
        process.terminate()
        process.wait()


def compare(options: argparse.Namespace) -> list[Cost]:
    """All rounds; every server in turn at each number of streams."""
    from ray import serve

    from deploy.app import build

    most = max(options.streams)
    serve.start(http_options={"host": "127.0.0.1", "port": options.port})
    serve.run(build({"model": MODEL, "max_num_seqs": most}), name="conclave", route_prefix="/")
    ours = Server(
        "conclave", options.port, "/v1/completions", process_titled("ray::ServeReplica:conclave")
    )
    body = {"prompt": [5, 6, 7, 8], "max_tokens": options.tokens, "ignore_eos": True}
    events = asyncio.run(read_stream(ours, {**body, "stream": True}))
    EVENTS.write_bytes(b"".join(events))
    most *= 2
    serve.run(bare_deployment(most).bind(), name="bare", route_prefix="/bare")
    bare = Server("serve", options.port, "/bare/", process_titled("ray::ServeReplica:bare"))
    costs = []
    print(f"at rest: {rest_us(ours):.0f} us of every second, bare Serve {rest_us(bare):.0f} us")
    with bare_uvicorn(options.port + 1) as plain:
        for streams in options.streams:
            for _ in range(options.rounds):
                cost = asyncio.run(measure(ours, streams, options.tokens, 0))
                costs.append(cost)
                gap_s = cost.seconds / options.tokens
                for other in (bare, plain):
                    costs.append(asyncio.run(measure(other, streams, options.tokens, gap_s)))
    return costs


def show(costs: list[Cost]) -> None:
    """A table of medians."""
    print("| streams | conclave us/token | bare Serve | bare uvicorn | of Serve | tokens/s |")
    print("|---|---|---|---|---|---|")
    for streams in sorted({cost.streams for cost in costs}):
        mine = [cost for cost in costs if cost.streams == streams]
        by = {
            name: statistics.median(c.cpu_us_per_token for c in mine if c.server == name)
            for name in ("conclave", "serve", "uvicorn")
        }
        speed = statistics.median(
            streams * c.tokens / c.seconds for c in mine if c.server == "conclave"
        )
        cells = " | ".join(f"{value:.0f}" for value in by.values())
        print(f"| {streams} | {cells} | {by['conclave'] / by['serve']:.2f} | {speed:.0f} |")


def main() -> None:
    """Parse arguments, start the servers, print the table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", nargs="+", type=int, default=[1, 64, 256])
    parser.add_argument("--tokens", type=int, default=64, help="of each stream")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--port", type=int, default=18431)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    from deploy.local_ray import ray_session

    with ray_session(num_cpus=4):
        costs = compare(options)
    show(costs)
    machine = {"machine": platform.processor(), "cores": os.cpu_count(), "load": os.getloadavg()[0]}
    if options.output:
        options.output.write_text(json.dumps({**machine, "rounds": [asdict(c) for c in costs]}))


if __name__ == "__main__":
    main()
