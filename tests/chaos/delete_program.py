"""A user's program that deletes an application while a dead stage is being replaced."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from pathlib import Path
from typing import Any

OPTIONS = {"model": "nano-dbrx", "stages": 2, "expert_shards": 2, "dtype": "float32"}
BODY = {
    "model": "nano-dbrx",
    "prompt": [5, 6, 7, 8],
    "max_tokens": 120,
    "temperature": 0,
    "ignore_eos": True,
    "stream": True,
    "return_token_ids": True,
}


async def _stream(handle: Any, first: asyncio.Event | None = None) -> list[int]:
    """The token ids of one answer, which must be whole."""
    ids: list[int] = []
    async for chunk in handle.options(stream=True).completions.remote(BODY):
        assert "error" not in chunk, chunk
        for choice in chunk["choices"]:
            ids += choice.get("token_ids") or []
        if first is not None and len(ids) > 5:
            first.set()
    assert len(ids) == BODY["max_tokens"]
    return ids


def _sockets() -> set[str]:
    """Names of all abstract sockets of model instances."""
    words = Path("/proc/net/unix").read_text().split()
    return {word for word in words if word.startswith("@conclave-")}


def _gone(pids: set[int]) -> bool:
    return not any(Path("/proc", str(pid)).exists() for pid in pids)


async def check_delete() -> None:
    from ray import serve

    from deploy.app import build

    others, shared = _sockets(), set(os.listdir("/dev/shm"))
    serve.start(http_options=None)
    handle = serve.run(build(OPTIONS), name="nano", route_prefix=None)
    expected = await _stream(handle)
    ours = _sockets() - others
    assert len(ours) >= 6, ours
    actors = (await handle.experts.remote())["actors"]
    pids = {int(actor["pid"]) for actor in actors}
    stage = next(int(a["pid"]) for a in actors if (a["role"], a["index"]) == ("stage", 1))
    first = asyncio.Event()
    asked = [asyncio.create_task(_stream(handle, first)) for _ in range(4)]
    await first.wait()
    os.kill(stage, signal.SIGKILL)
    await asyncio.to_thread(serve.delete, "nano")
    assert await asyncio.gather(*asked) == [expected] * 4, "deletion drains what is open"
    deadline = time.monotonic() + 20
    while not (_gone(pids) and not ours & _sockets()) and time.monotonic() < deadline:
        await asyncio.sleep(0.1)
    assert _gone(pids), "workers outlived their application"
    assert not ours & _sockets(), "sockets outlived their application"
    left = {name for name in set(os.listdir("/dev/shm")) - shared if "conclave" in name}
    assert not left, left
    serve.shutdown()


if __name__ == "__main__":
    from deploy.local_ray import ray_session

    with ray_session(num_cpus=4):
        asyncio.run(check_delete())
    print("nothing is left")
