"""Real replicas come and go with the load, and no stream notices."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.conftest import Server, serving, wait_until

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(900)]

FLAGS = [
    *("nano-phimoe", "--executor", "local", "--dtype", "float32", "--kv-cache-memory", "64MiB"),
    *("--max-num-seqs", "4", "--ttft-target", "0.5", "--scale-down-delay", "5"),
]
TOKENS = 48


class Crowd:
    """Users who ask one thing after the other; every stream has to be whole and the same."""

    def __init__(self, url: str, expected: str) -> None:
        self._url = url
        self._expected = expected
        self.wanted = 1
        self.num_whole = 0
        self.wrong: list[str] = []

    async def user(self, index: int, client: httpx.AsyncClient, over: Callable[[], bool]) -> None:
        """Asks whenever there should be more than `index` users."""
        while not over():
            if index >= self.wanted:
                await asyncio.sleep(0.2)
                continue
            try:
                text = await streamed(client, self._url)
            except (httpx.HTTPError, ValueError, KeyError) as error:
                self.wrong.append(repr(error))
                continue
            if text == self._expected:
                self.num_whole += 1
            else:
                self.wrong.append(text)


def body(stream: bool) -> dict[str, Any]:
    return {
        "prompt": [5, 6, 7, 8],
        "max_tokens": TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "stream": stream,
    }


async def streamed(client: httpx.AsyncClient, url: str) -> str:
    """The text of one stream. Raises ValueError where it has no proper end."""
    text, finish, lines = "", None, []
    async with client.stream("POST", f"{url}/v1/completions", json=body(True)) as response:
        async for line in response.aiter_lines():
            if line:
                lines.append(line)
    if response.status_code != 200 or not lines or lines[-1] != "data: [DONE]":
        raise ValueError(f"{response.status_code}: {lines[-3:]}")
    for line in lines[:-1]:
        if line.startswith("data: "):
            [choice] = json.loads(line[6:])["choices"]
            text += choice["text"]
            finish = choice["finish_reason"] or finish
    if finish != "length":
        raise ValueError(f"ended with {finish}")
    return text


async def num_replicas(url: str) -> int:
    """Those that answer, by asking often enough to meet each of them."""
    async with httpx.AsyncClient(timeout=60) as client:
        found = [(await client.get(f"{url}/v1/experts")).json()["replica_id"] for _ in range(12)]
    return len(set(found))


async def until_replicas(url: str, number: int, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if await num_replicas(url) == number:
            return True
        await asyncio.sleep(1)
    return False


async def two_cycles(url: str) -> Crowd:
    """From one user to forty and back, twice; somebody asks all the time."""
    async with httpx.AsyncClient(timeout=300) as client:
        crowd = Crowd(
            url,
            (await client.post(f"{url}/v1/completions", json=body(False))).json()["choices"][0][
                "text"
            ],
        )
        ended = False
        users = [asyncio.ensure_future(crowd.user(i, client, lambda: ended)) for i in range(40)]
        try:
            for _ in range(2):
                crowd.wanted = 40
                assert await until_replicas(url, 2, 180), "no replica was added"
                crowd.wanted = 1
                assert await until_replicas(url, 1, 180), "no replica was taken away"
        finally:
            ended = True
            await asyncio.gather(*users)
    return crowd


def test_a_second_replica_comes_and_goes_twice(log: Path) -> None:
    with serving(log, *FLAGS, "--max-replicas", "2") as server:
        crowd = asyncio.run(two_cycles(server.url))
    assert crowd.wrong == []
    assert crowd.num_whole > 100


def replicas_of(server: Server) -> list[int]:
    """Processes that Serve has named as replicas."""
    found = []
    for pid in server.family():
        try:
            if b"ServeReplica" in Path("/proc", str(pid), "cmdline").read_bytes():
                found.append(pid)
        except OSError:
            continue
    return found


def test_none_when_idle_and_one_when_somebody_asks(log: Path) -> None:
    flags = [*FLAGS, "--min-replicas", "0"]
    with serving(log, *flags) as server, httpx.Client(timeout=300) as client:
        url = f"{server.url}/v1/completions"
        first = client.post(url, json=body(False)).json()["choices"]
        assert len(replicas_of(server)) == 1
        assert wait_until(lambda: not replicas_of(server), 120), "the idle replica stayed"
        again = client.post(url, json=body(False))
        assert again.status_code == 200
        assert again.json()["choices"] == first
        assert len(replicas_of(server)) == 1
