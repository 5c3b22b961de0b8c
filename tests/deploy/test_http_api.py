"""The HTTP application in process: shapes, streams, errors, keys."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import httpx
import pytest

from router.layer_totals import LayerTotals
from shards.client import (
    GroupFailed,
    GroupState,
    GroupUnavailable,
    SequenceRefused,
    Trouble,
    WorkerKilled,
)
from tests.deploy.http_client import client_of, is_openai_error, post

USER = [{"role": "user", "content": "Hi"}]
MakeApi = Callable[..., Any]


def events(response: httpx.Response) -> list[Any]:
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = [line for line in response.text.split("\n\n") if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


async def test_chat(make_api: MakeApi) -> None:
    api = make_api("Hello there")
    response = await post(api, "/v1/chat/completions", {"model": "nano-jamba", "messages": USER})
    body = response.json()
    assert response.status_code == 200
    assert body["object"] == "chat.completion"
    assert body["id"].startswith("chatcmpl-")
    [choice] = body["choices"]
    assert choice["message"]["role"] == "assistant"
    assert choice["message"]["content"] == "Hello there"
    assert choice["finish_reason"] == "stop"
    assert choice["logprobs"] is None
    # The template writes the BOS itself: it must not be there twice.
    assert api.client.prompts[0].count(1) == 1
    num_emitted = api.client.streams[0].emitted
    assert body["usage"]["prompt_tokens"] == len(api.client.prompts[0])
    assert body["usage"]["completion_tokens"] == num_emitted
    assert body["usage"]["total_tokens"] == len(api.client.prompts[0]) + num_emitted
    assert "warnings" not in body


async def test_chat_stream_has_openais_order(make_api: MakeApi) -> None:
    api = make_api("Hello there")
    body = {"messages": USER, "stream": True, "stream_options": {"include_usage": True}}
    chunks = events(await post(api, "/v1/chat/completions", body))
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    text = "".join(c["choices"][0]["delta"].get("content", "") for c in chunks[:-1])
    assert text == "Hello there"
    reasons = [c["choices"][0]["finish_reason"] for c in chunks[:-1]]
    assert reasons == [None] * (len(reasons) - 1) + ["stop"]
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == api.client.streams[0].emitted
    assert all(c["usage"] is None for c in chunks[:-1])
    assert {c["id"] for c in chunks} == {chunks[0]["id"]}
    assert {c["object"] for c in chunks} == {"chat.completion.chunk"}


async def test_no_usage_unless_asked(make_api: MakeApi) -> None:
    chunks = events(
        await post(make_api(), "/v1/chat/completions", {"messages": USER, "stream": True})
    )
    assert all("usage" not in chunk and chunk["choices"] for chunk in chunks)


async def test_completions_of_several_prompts(make_api: MakeApi) -> None:
    api = make_api("abc def")
    body = {"prompt": ["one", "two"], "n": 2, "max_tokens": 50}
    reply = (await post(api, "/v1/completions", body)).json()
    assert reply["object"] == "text_completion"
    assert [c["index"] for c in reply["choices"]] == [0, 1, 2, 3]
    assert {c["text"] for c in reply["choices"]} == {"abc def"}
    assert [s.sampling.sample_idx for s in api.client.streams] == [0, 1, 0, 1]
    assert len({s.sampling.seed for s in api.client.streams}) == 1
    assert api.client.prompts[0] == api.client.prompts[1] != api.client.prompts[2]
    # A text prompt gets the tokenizer's BOS; a chat gets the template's.
    assert api.client.prompts[0][0] == 1


async def test_stream_of_several_choices(make_api: MakeApi) -> None:
    api = make_api("abc")
    body = {"messages": USER, "n": 3, "stream": True, "seed": -5}
    chunks = events(await post(api, "/v1/chat/completions", body))
    for index in range(3):
        mine = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == index]
        assert mine[0]["delta"]["role"] == "assistant"
        assert "".join(c["delta"].get("content", "") for c in mine) == "abc"
        assert [c["finish_reason"] for c in mine].count("stop") == 1


async def test_completion_default_is_16_tokens(make_api: MakeApi) -> None:
    api = make_api(ids=[70] * 200)
    reply = (await post(api, "/v1/completions", {"prompt": [5, 6]})).json()
    assert reply["choices"][0]["finish_reason"] == "length"
    assert reply["usage"]["completion_tokens"] == 16
    assert api.client.prompts == [(5, 6)]


async def test_chat_default_is_the_rest_of_the_context(make_api: MakeApi) -> None:
    api = make_api(ids=[70] * 300)
    reply = (await post(api, "/v1/chat/completions", {"messages": USER})).json()
    assert reply["usage"]["total_tokens"] == 256


async def test_stop_string_cuts_and_aborts(make_api: MakeApi) -> None:
    api = make_api("one two three four", delay=0.001)
    body = {"messages": USER, "stop": [" thr", "zzz"]}
    reply = (await post(api, "/v1/chat/completions", body)).json()
    assert reply["choices"][0]["message"]["content"] == "one two"
    assert reply["choices"][0]["finish_reason"] == "stop"
    [stream] = api.client.streams
    assert stream.aborted
    assert stream.emitted < len(stream.ids)
    assert reply["usage"]["completion_tokens"] == stream.emitted


async def test_logprobs_and_token_ids(make_api: MakeApi) -> None:
    api = make_api("ab")
    body = {
        "messages": USER,
        "logprobs": True,
        "top_logprobs": 2,
        "return_tokens_as_token_ids": True,
        "return_token_ids": True,
    }
    reply = (await post(api, "/v1/chat/completions", body)).json()
    [choice] = reply["choices"]
    ids = api.client.streams[0].ids
    assert choice["token_ids"] == ids
    assert reply["prompt_token_ids"] == list(api.client.prompts[0])
    content = choice["logprobs"]["content"]
    assert [entry["token"] for entry in content] == [f"token_id:{i}" for i in ids]
    assert content[0]["bytes"] == list(b"a")
    assert [top["token"] for top in content[0]["top_logprobs"]] == [
        f"token_id:{ids[0]}",
        f"token_id:{ids[0] + 1}",
    ]


async def test_completion_logprobs(make_api: MakeApi) -> None:
    api = make_api("aé")
    body = {"prompt": "x", "logprobs": 1, "max_tokens": 9}
    logprobs = (await post(api, "/v1/completions", body)).json()["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["a", "bytes:\\xc3", "bytes:\\xa9", "<|eom|>"]
    assert logprobs["text_offset"] == [0, 1, 1, 2]
    assert logprobs["token_logprobs"] == [-0.5] * 4
    assert logprobs["top_logprobs"][0] == {"a": -0.5}


async def test_unknown_fields_are_named(make_api: MakeApi) -> None:
    body = {"messages": USER, "tempreature": 0.5, "user": "me"}
    reply = (await post(make_api(), "/v1/chat/completions", body)).json()
    assert reply["warnings"] == ["unknown field tempreature has no effect"]
    chunks = events(await post(make_api(), "/v1/chat/completions", {**body, "stream": True}))
    assert [("warnings" in chunk) for chunk in chunks] == [True] + [False] * (len(chunks) - 1)


async def test_wrong_model_and_unknown_paths(make_api: MakeApi) -> None:
    body = {"messages": USER, "model": "gpt-\u00e9"}
    async with client_of(make_api().app()) as client:
        response = await client.post("/v1/chat/completions", content=json.dumps(body))
        assert response.status_code == 404
        assert response.json()["error"]["code"] == "model_not_found"
        for path in ("/", "/v1", "/v1/nothing", "/docs"):
            response = await client.get(path)
            assert response.status_code == 404
            assert is_openai_error(response.json())
        response = await client.get("/v1/completions")
        assert response.status_code == 405
        assert is_openai_error(response.json())


async def test_models_experts_version_health(make_api: MakeApi) -> None:
    api = make_api()
    async with client_of(api.app()) as client:
        models = (await client.get("/v1/models")).json()
        assert models["data"][0]["id"] == "nano-jamba"
        assert models["data"][0]["max_model_len"] == 256
        assert (await client.get("/v1/models/nano-jamba")).json() == models["data"][0]
        assert (await client.get("/v1/models/other")).status_code == 404
        experts = (await client.get("/v1/experts")).json()
        assert experts["replica_id"] == "r1"
        assert experts["routing_table_version"] == 3
        assert experts["actors"][0]["experts"] == [1, 3]
        assert experts["dispatch"] == []
        api.client.layer_totals[2] = LayerTotals(
            exchanges=4, calls=8, sent_bytes=100, received_bytes=60, seconds=0.001, tokens=[3, 1]
        )
        (layer,) = (await client.get("/v1/experts")).json()["dispatch"]
        assert layer == {
            "layer": 2,
            "exchanges": 4,
            "calls": 8,
            "resends": 0,
            "sent_bytes": 100,
            "received_bytes": 60,
            "seconds": 0.001,
            "tokens": [3, 1],
            "mean_microseconds": 250.0,
            "mean_bytes": 40,
        }
        assert (await client.get("/version")).status_code == 200
        for state, health, ready in (
            (GroupState.READY, 200, 200),
            (GroupState.STARTING, 200, 503),
            (GroupState.RECOVERING, 200, 503),
            (GroupState.FAILED, 503, 503),
        ):
            api.client.state = state
            response = await client.get("/health")
            assert (response.status_code, response.json()) == (health, {"state": str(state)})
            assert (await client.get("/ready")).status_code == ready


async def test_recovering_accepts_failed_refuses(make_api: MakeApi) -> None:
    api = make_api()
    api.client.state = GroupState.RECOVERING
    assert (await post(api, "/v1/completions", {"prompt": "x"})).status_code == 200
    api.client.state = GroupState.FAILED
    response = await post(api, "/v1/completions", {"prompt": "x"})
    assert response.status_code == 503
    assert is_openai_error(response.json())


@pytest.mark.parametrize("stream", [False, True])
async def test_refusals_and_failures(make_api: MakeApi, stream: bool) -> None:
    body = {"prompt": "x", "stream": stream, "max_tokens": 9}
    response = await post(make_api(ids=[], error=SequenceRefused("no")), "/v1/completions", body)
    assert response.status_code == 400
    response = await post(make_api(ids=[], error=GroupFailed("gone")), "/v1/completions", body)
    assert response.status_code == 503
    assert is_openai_error(response.json())
    response = await post(make_api(ids=[], error=KeyError("bug")), "/v1/completions", body)
    assert response.status_code == 500
    assert is_openai_error(response.json())
    assert "bug" not in response.text


@pytest.mark.parametrize("stream", [False, True])
async def test_errors_of_supervision_have_their_own_codes(make_api: MakeApi, stream: bool) -> None:
    body = {"prompt": "x", "stream": stream, "max_tokens": 9}
    killed, waited = WorkerKilled("stage-0 died"), GroupUnavailable("still recovering", 2.5)
    for error, status, code in (
        (killed, 500, "request_failed_worker"),
        (waited, 503, "model_recovering"),
    ):
        response = await post(make_api(ids=[], error=error), "/v1/completions", body)
        assert (response.status_code, response.json()["error"]["code"]) == (status, code)
        assert is_openai_error(response.json())
        assert response.headers.get("retry-after") == ("3" if status == 503 else None)


async def test_nobody_waits_when_it_is_hopeless(make_api: MakeApi) -> None:
    api = make_api()
    api.client.state = GroupState.RECOVERING
    api.client.unavailable = GroupUnavailable("still recovering after 120 s", 10.0)
    api.client.trouble = Trouble(
        worker="stage-1",
        reason="exit code -9",
        deaths_in_a_row=5,
        healing_s=130.5,
        respawn_in_s=4.0,
    )
    response = await post(api, "/v1/completions", {"prompt": "x"})
    assert response.status_code == 503
    assert response.headers["retry-after"] == "10"
    assert response.json()["error"]["code"] == "model_recovering"
    assert not api.client.streams
    async with client_of(api.app()) as client:
        health = await client.get("/health")
        assert health.status_code == 200, "it goes on healing"
        assert health.json() == {
            "state": "recovering",
            "worker": "stage-1",
            "reason": "exit code -9",
            "deaths_in_a_row": 5,
            "healing_s": 130.5,
            "respawn_in_s": 4.0,
        }
        ready = await client.get("/ready")
        assert (ready.status_code, ready.headers["retry-after"]) == (503, "1")


async def test_failure_inside_a_stream_is_its_last_event(make_api: MakeApi) -> None:
    api = make_api(ids=[70, 71], error=GroupFailed("gone"))
    chunks = events(await post(api, "/v1/completions", {"prompt": "x", "stream": True}))
    assert is_openai_error(chunks[-1])
    assert chunks[-1]["error"]["code"] == "model_failed"


async def test_api_keys(make_api: MakeApi) -> None:
    async with client_of(make_api().app(("k1", "k2"))) as client:
        for headers in ({}, {"Authorization": "Bearer k3"}, {"Authorization": "k1"}):
            response = await client.get("/v1/models", headers=headers)
            assert response.status_code == 401
            assert is_openai_error(response.json())
            assert response.json()["error"]["code"] == "invalid_api_key"
        for key in ("k1", "k2"):
            headers = {"Authorization": f"Bearer {key}"}
            assert (await client.get("/v1/models", headers=headers)).status_code == 200
        assert (await client.get("/health")).status_code == 200
        assert (await client.get("/ready")).status_code == 200


async def test_overload_says_when_to_come_back(make_api: MakeApi) -> None:
    api = make_api("abc", max_num_seqs=1, delay=0.05)
    app = api.app()
    async with client_of(app) as client:
        body = {"prompt": "x", "max_tokens": 9}
        busy = asyncio.gather(*(client.post("/v1/completions", json=body) for _ in range(17)))
        await asyncio.sleep(0.05)
        response = await client.post("/v1/completions", json=body)
        assert response.status_code == 429
        assert is_openai_error(response.json())
        assert response.json()["error"]["code"] == "rate_limit_exceeded"
        assert 1 <= int(response.headers["retry-after"]) <= 60
        assert 0 < int(response.headers["retry-after-ms"]) <= 60_000
        assert {r.status_code for r in await busy} == {200}
        assert (await client.post("/v1/completions", json=body)).status_code == 200


async def test_without_tokenizer_token_ids_are_served(make_api: MakeApi, nano_jamba: Any) -> None:
    bare = replace(nano_jamba, tokenizer=None, template=None)
    api = make_api(ids=[70, 71, nano_jamba.defaults.eos_token_ids[-1]], model=bare)
    reply = (await post(api, "/v1/completions", {"prompt": [5], "return_token_ids": True})).json()
    assert reply["choices"][0]["text"] == ""
    assert reply["choices"][0]["token_ids"] == api.client.streams[0].ids
    assert reply["choices"][0]["finish_reason"] == "stop"
    for path, body in (
        ("/v1/completions", {"prompt": "x"}),
        ("/v1/completions", {"prompt": [5], "stop": "x"}),
        ("/v1/chat/completions", {"messages": USER}),
    ):
        response = await post(api, path, body)
        assert response.status_code == 400
        assert response.json()["error"]["code"] == "tokenizer_missing"
