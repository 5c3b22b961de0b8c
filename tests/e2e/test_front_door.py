"""Limits, keys and overload as clients of a whole server meet them, Serve's proxy included."""

from __future__ import annotations

import asyncio
import json
import socket
import statistics
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.e2e.conftest import Server, serving, wait_until

pytestmark = pytest.mark.e2e
MODEL = "nano-jamba"
KEY = {"Authorization": "Bearer k"}
PAGE = "https://page.example"
OPTIONS = (
    *("--max-num-seqs", "1", "--body-timeout", "1", "--max-request-bytes", "200kB"),
    *("--api-key", "k", "--cors-origin", PAGE, "--strict-requests"),
)
GOOD = {"prompt": [5, 6, 7], "max_tokens": 4, "temperature": 0}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log: Path = tmp_path_factory.mktemp("front") / "server.log"
    with serving(log, MODEL, *OPTIONS) as running:
        yield running


@pytest.fixture
def http(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, headers=KEY, timeout=30) as client:
        yield client


def code_of(response: httpx.Response) -> Any:
    return response.json()["error"]["code"]


def test_keys_pages_and_unknown_fields(server: Server, http: httpx.Client) -> None:
    for path in ("/v1/models", "/openapi.json", "/version", "/nothing"):
        assert httpx.get(server.url + path).status_code == 401
    for path in ("/health", "/ready"):
        response = httpx.head(server.url + path)
        assert (response.status_code, response.content) == (200, b"")
    assert httpx.get(f"{server.url}/-/routes").json() == {"/": MODEL}
    assert httpx.get(f"{server.url}/-/healthz").text == "success"
    preflight = {"Origin": PAGE, "Access-Control-Request-Method": "POST"}
    response = httpx.options(f"{server.url}/v1/completions", headers=preflight)
    assert response.status_code == 204
    assert response.headers["access-control-allow-origin"] == PAGE
    response = http.post("/v1/completions", json={**GOOD, "typo": 1})
    assert (response.status_code, code_of(response)) == (400, "unknown_parameter")
    assert "/v1/chat/completions" in http.get("/openapi.json").json()["paths"]


def test_bodies_that_are_too_large_or_too_slow(server: Server, http: httpx.Client) -> None:
    response = http.post("/v1/completions", json={"prompt": "x" * 300_000})
    assert (response.status_code, code_of(response)) == (413, "request_too_large")
    chunks = iter([b" " * 50_000] * 10)
    response = http.post("/v1/completions", content=chunks)
    assert (response.status_code, code_of(response)) == (413, "request_too_large")
    host, port = server.url.removeprefix("http://").split(":")
    slow = [socket.create_connection((host, int(port)), timeout=20) for _ in range(40)]
    head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer k\r\n"
    for connection in slow:
        connection.sendall(f"{head}Content-Length: 1000\r\n\r\n{{".encode())
    assert http.post("/v1/completions", json=GOOD).status_code == 200
    for connection in slow:
        answer = connection.recv(65536)
        assert answer.startswith(b"HTTP/1.1 408"), answer
        connection.close()
    assert http.get("/health").json() == {"state": "ready"}


def test_clients_that_leave_while_their_body_is_read(server: Server, http: httpx.Client) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer k\r\n"
    before = _ended(http)
    for wait_ms in range(60):  # whatever of the server is at work when they leave
        with socket.create_connection((host, int(port)), timeout=30) as connection:
            connection.sendall(head.encode() + b"Content-Length: 100000\r\n\r\n{")
            time.sleep(wait_ms % 20 / 1000)
            connection.sendall(b" " * 20_000)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    assert wait_until(lambda: _samples(http, "requests_in_progress") == 1, 10)
    after = _ended(http)
    assert after["499"] > before["499"]
    assert after["500"] == before["500"]


def _ended(http: httpx.Client) -> dict[str, float]:
    route = 'route="/v1/completions"'
    return {
        status: _samples(http, "requests_total", route, f'status="{status}"')
        for status in ("499", "500")
    }


def _samples(http: httpx.Client, name: str, *labels: str) -> float:
    """The sum of a metric's series that have `labels`."""
    lines = [line for line in http.get("/metrics").text.splitlines() if name in line]
    chosen = [line for line in lines if line[0] != "#" and all(each in line for each in labels)]
    return sum(float(line.rsplit(" ", 1)[1]) for line in chosen)


async def test_a_client_that_honours_retry_after_is_served(server: Server) -> None:
    """A crowd of several times what may wait; how long a refusal took is printed."""
    refused: list[float] = []
    times: dict[httpx.Request, float] = {}

    async def sent(request: httpx.Request) -> None:
        times[request] = time.perf_counter()

    async def came(response: httpx.Response) -> None:
        if response.status_code == 429:
            refused.append(time.perf_counter() - times.pop(response.request))
            assert int(response.headers["retry-after"]) >= 1

    hooks: Any = {"request": [sent], "response": [came]}
    limits = httpx.Limits(max_connections=200)
    async with (
        httpx.AsyncClient(event_hooks=hooks, limits=limits, timeout=120) as http,
        openai.AsyncOpenAI(
            base_url=f"{server.url}/v1", api_key="k", http_client=http, max_retries=8
        ) as client,
    ):

        async def ask() -> str:
            reply = await client.completions.create(
                model=MODEL, prompt=[5, 6, 7], max_tokens=64, extra_body={"ignore_eos": True}
            )
            return reply.choices[0].finish_reason

        assert set(await asyncio.gather(*(ask() for _ in range(80)))) == {"length"}
    assert refused, "nobody was refused: the test says nothing"
    cuts = statistics.quantiles(refused, n=100)
    print(f"{len(refused)} refusals: median {1000 * cuts[49]:.1f} ms, p99 {1000 * cuts[98]:.1f} ms")


@pytest.mark.parametrize("words", [1, 15_000])
async def test_a_refusal_under_load_is_quick(server: Server, words: int) -> None:
    """One client at a time beside a full server; the longer body would take long to tokenize."""
    body = json.dumps({"prompt": "some words " * words}).encode()

    async def busy(http: httpx.AsyncClient) -> None:
        asked = {"prompt": [5], "max_tokens": 500, "ignore_eos": True, "stream": True}
        while True:
            async with http.stream("POST", "/v1/completions", json=asked) as response:
                async for _ in response.aiter_lines():
                    pass

    took: list[float] = []
    refused = 0
    async with crowd_client(server) as http:
        tasks = [asyncio.create_task(busy(http)) for _ in range(20)]
        await asyncio.sleep(1.0)
        for _ in range(50):
            started = time.perf_counter()
            response = await http.post("/v1/completions", content=body)
            took.append(time.perf_counter() - started)
            # Otherwise one had just ended.
            assert response.status_code in (200, 400, 429)
            refused += response.status_code == 429
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    assert refused > 25, "the server was not full: the test says nothing"
    middle, most = 1000 * statistics.median(took), 1000 * max(took)
    print(f"{len(body)} bytes, {refused} of {len(took)}: median {middle:.1f}, most {most:.1f} ms")


def crowd_client(server: Server) -> httpx.AsyncClient:
    limits = httpx.Limits(max_connections=200)
    return httpx.AsyncClient(base_url=server.url, headers=KEY, timeout=120, limits=limits)
