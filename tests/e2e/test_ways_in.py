"""One request, four ways in: `conclave serve`, `serve run`, curl, the openai client, the handle."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.e2e.conftest import free_port, serving

pytestmark = pytest.mark.e2e

MODEL = "nano-jamba"
MESSAGES = [{"role": "user", "content": "What is the capital of France?"}]
BODY: dict[str, Any] = {"model": MODEL, "messages": MESSAGES, "temperature": 0, "max_tokens": 24}
OPTIONS = {"model": MODEL, "stages": 2, "expert_shards": 2, "dtype": "float32"}


@pytest.fixture
def ray_here() -> Iterator[None]:
    """A private Ray for one test."""
    from deploy.local_ray import ray_session

    with ray_session(num_cpus=4):
        yield


async def _collect(chunks: AsyncIterator[dict[str, Any]]) -> str:
    """The text of a stream, whose shape is checked on the way."""
    seen = [chunk async for chunk in chunks]
    assert seen[0]["choices"][0]["delta"]["role"] == "assistant"
    finishes = [c["finish_reason"] for chunk in seen for c in chunk["choices"]]
    assert [f for f in finishes if f] == ["stop"]
    return "".join(c["delta"].get("content") or "" for chunk in seen for c in chunk["choices"])


async def test_handle_http_curl_and_openai_client_agree(ray_here: None) -> None:
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
        curl = await asyncio.create_subprocess_exec(
            "curl",
            "--silent",
            "--max-time",
            "60",
            f"{url}/v1/chat/completions",
            "--header",
            "Content-Type: application/json",
            "--data",
            json.dumps(BODY),
            stdout=asyncio.subprocess.PIPE,
        )
        output, _ = await curl.communicate()
        assert json.loads(output)["choices"][0]["message"]["content"] == text
        await _two_replicas_share_the_load(client, url, text)
        assert (await handle.models.remote())["data"][0]["id"] == MODEL
        refused = await handle.chat.remote({**BODY, "temperature": 99})
        assert refused["error"]["param"] == "temperature"
        _check_actor_names()
    finally:
        await asyncio.to_thread(serve.shutdown)


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
    """`conclave/{app}/{replica}/{role}-{index}`, one of each per replica."""
    import ray

    names = [a["name"] for a in ray.util.list_named_actors(all_namespaces=True)]
    ours = [n.split("/") for n in names if n.startswith("conclave/")]
    assert {parts[1] for parts in ours} == {"nano"}
    roles = {"engine-0", "stage-0", "stage-1", "dispatcher-0", "expert-0", "expert-1"}
    for replica in {parts[2] for parts in ours}:
        assert {parts[3] for parts in ours if parts[2] == replica} == roles


def test_serve_run_gives_the_same_text_as_conclave_serve(tmp_path: Path) -> None:
    flags = ["--stages", "2", "--expert-shards", "2", "--dtype", "float32"]
    with serving(tmp_path / "conclave.log", MODEL, *flags) as server:
        reply = httpx.post(f"{server.url}/v1/chat/completions", json=BODY, timeout=60)
        text = reply.json()["choices"][0]["message"]["content"]
    port = free_port()
    config = tmp_path / "serve.yaml"
    lines = [f"http_options: {{host: 127.0.0.1, port: {port}}}", "applications:"]
    lines += ["  - name: nano", "    import_path: deploy.app:build", "    args:"]
    lines += [f"      {key}: {value}" for key, value in OPTIONS.items()]
    config.write_text("\n".join(lines))
    command = (str(Path(sys.executable).with_name("serve")), "run", str(config))
    with serving(tmp_path / "run.log", command=command, port=port) as server:
        reply = httpx.post(f"{server.url}/v1/chat/completions", json=BODY, timeout=60)
    assert reply.json()["choices"][0]["message"]["content"] == text


def test_a_bad_option_of_serve_run_fails_before_anything_is_read() -> None:
    from deploy.app import build
    from deploy.config import ConfigError

    with pytest.raises(ConfigError, match=r"expert_shard.*allowed options are"):
        build({"model": MODEL, "expert_shard": 2})


def test_usage_errors_exit_with_2_in_one_sentence() -> None:
    command = [sys.executable, "-m", "deploy.cli", "serve", MODEL, "--stages", "99"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "stages=99" in done.stderr
