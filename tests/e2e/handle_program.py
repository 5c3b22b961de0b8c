"""A user's program: runs the application on its own Ray and asks it in every way there is."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import AsyncIterator
from typing import Any

import httpx
import openai

from tests.e2e.conftest import free_port

MODEL = "nano-jamba"
MESSAGES = [{"role": "user", "content": "What is the capital of France?"}]
BODY: dict[str, Any] = {"model": MODEL, "messages": MESSAGES, "temperature": 0, "max_tokens": 24}
OPTIONS = {"model": MODEL, "stages": 2, "expert_shards": 2, "dtype": "float32"}


async def _collect(chunks: AsyncIterator[dict[str, Any]]) -> str:
    """The text of a stream, whose shape is checked on the way."""
    seen = [chunk async for chunk in chunks]
    assert seen[0]["choices"][0]["delta"]["role"] == "assistant"
    finishes = [c["finish_reason"] for chunk in seen for c in chunk["choices"]]
    assert [f for f in finishes if f] == ["stop"]
    return "".join(c["delta"].get("content") or "" for chunk in seen for c in chunk["choices"])


async def check_every_way() -> None:
    from ray import serve

    from deploy.app import build

    port = free_port()
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    handle = serve.run(build({**OPTIONS, "min_replicas": 2}), name="nano", route_prefix="/")
    url = f"http://127.0.0.1:{port}"
    try:
        reply = await handle.chat.remote(BODY)
        text = reply["choices"][0]["message"]["content"]
        assert text
        streaming = handle.options(stream=True).chat.remote({**BODY, "stream": True})
        assert await _collect(streaming) == text
        client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none")
        whole = await client.chat.completions.create(**BODY)
        assert whole.choices[0].message.content == text
        parts = await client.chat.completions.create(**BODY, stream=True)
        assert await _collect(part.model_dump() async for part in parts) == text
        if shutil.which("curl"):
            assert await _curl(f"{url}/v1/chat/completions") == text
        await _two_replicas_share_the_load(client, url, text)
        assert (await handle.models.remote())["data"][0]["id"] == MODEL
        refused = await handle.chat.remote({**BODY, "temperature": 99})
        assert refused["error"]["param"] == "temperature"
        await _cancelled_calls_are_aborted(handle)
        _check_actor_names()
    finally:
        await asyncio.to_thread(serve.shutdown)


async def _cancelled_calls_are_aborted(handle: Any) -> None:
    """A response and a stream: the engine has nothing left to do long before they would end."""
    body = {"prompt": [5, 6, 7], "max_tokens": 480, "ignore_eos": True, "temperature": 0}
    response = handle.completions.remote(body)
    while not await _is_running(handle):
        await asyncio.sleep(0.02)
    response.cancel()
    await _comes_to_rest(handle)
    stream = handle.options(stream=True).completions.remote({**body, "stream": True})
    for _ in range(3):
        await anext(stream)
    assert await _is_running(handle)
    stream.cancel()
    await _comes_to_rest(handle)
    text = await handle.metrics.remote()
    assert "conclave_actors_alive" in text


async def _is_running(handle: Any) -> bool:
    """Whether either replica's engine has a sequence; Serve chooses whom it asks."""
    running: dict[str, int] = {}
    while len(running) < 2:
        maps = await asyncio.gather(*(handle.experts.remote() for _ in range(40)))
        running |= {m["replica_id"]: m["load"]["running"] for m in maps}
    return any(running.values())


async def _comes_to_rest(handle: Any) -> None:
    async with asyncio.timeout(20):
        while await _is_running(handle):
            await asyncio.sleep(0.02)


async def _curl(url: str) -> str:
    """The same request by curl."""
    header, data = "Content-Type: application/json", json.dumps(BODY)
    command = ["curl", "--silent", "--max-time", "60", url, "--header", header, "--data", data]
    curl = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    output, _ = await curl.communicate()
    return str(json.loads(output)["choices"][0]["message"]["content"])


async def _two_replicas_share_the_load(client: openai.AsyncOpenAI, url: str, text: str) -> None:
    """A burst is answered alike by both replicas."""
    replies = await asyncio.gather(*(client.chat.completions.create(**BODY) for _ in range(24)))
    assert {reply.choices[0].message.content for reply in replies} == {text}
    async with httpx.AsyncClient(base_url=url) as http:
        maps = [(await http.get("/v1/experts")).json() for _ in range(40)]
    replicas = {m["replica_id"] for m in maps}
    assert len(replicas) == 2
    pids = {a["pid"] for m in maps for a in m["actors"]}
    assert len(pids) == 2 * (1 + 2 + 1 + 2), "engine, stages, dispatcher and experts of each"


def _check_actor_names() -> None:
    """`conclave/{app}/{replica}/{role}-{index}`, one of each per replica, and its spares."""
    import ray

    names = [a["name"] for a in ray.util.list_named_actors(all_namespaces=True)]
    ours = [n.split("/") for n in names if n.startswith("conclave/")]
    assert {parts[1] for parts in ours} == {"nano"}
    roles = {"engine-0", "stage-0", "stage-1", "dispatcher-0", "expert-0", "expert-1"}
    for replica in {parts[2] for parts in ours}:
        actors = {parts[3] for parts in ours if parts[2] == replica}
        assert {name for name in actors if not name.startswith("spare-")} == roles


if __name__ == "__main__":
    from deploy.local_ray import ray_session

    with ray_session(num_cpus=4):
        asyncio.run(check_every_way())
    print("all ways agree")
