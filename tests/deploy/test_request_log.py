"""Request ids on every response, and what is logged of a request."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest

from deploy.request_record import sane_id
from shards.logs import JsonLines, TextLines, log_to_stderr, request_id
from tests.deploy.http_client import client_of

MakeApi = Callable[..., Any]
SECRET = "a very private question"
CHAT = {"messages": [{"role": "user", "content": SECRET}]}


@contextmanager
def logged(formatter: logging.Formatter, level: int = logging.INFO) -> Iterator[io.StringIO]:
    """What `conclave` loggers write meanwhile."""
    sink = io.StringIO()
    handler, logger = logging.StreamHandler(sink), logging.getLogger("conclave")
    handler.setFormatter(formatter)
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(level)
    try:
        yield sink
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("POST", "/v1/chat/completions", CHAT, 200),
        ("POST", "/v1/chat/completions", {**CHAT, "stream": True}, 200),
        ("POST", "/v1/chat/completions", {**CHAT, "temperature": -1}, 400),
        ("POST", "/v1/completions", "no object", 400),
        ("GET", "/v1/models", None, 200),
        ("GET", "/v1/models/other", None, 404),
        ("GET", "/nowhere", None, 404),
        ("GET", "/v1/completions", None, 405),
        ("GET", "/health", None, 200),
        ("GET", "/metrics", None, 200),
    ],
)
async def test_the_clients_id_is_on_every_response(
    make_api: MakeApi, method: str, path: str, body: Any, status: int
) -> None:
    async with client_of(make_api().app()) as client:
        for given in ("trace-1 of 2", "x", "y" * 128):
            reply = await client.request(method, path, json=body, headers={"x-request-id": given})
            assert reply.status_code == status
            assert reply.headers.get_list("x-request-id") == [given]
        for given in ("z" * 129, "", "caf\u00e9", "a\tb"):
            headers = [(b"x-request-id", given.encode("latin-1"))]
            reply = await client.request(method, path, json=body, headers=headers)
            [own] = reply.headers.get_list("x-request-id")
            assert own != given
            assert sane_id(own)


async def test_wrong_keys_get_an_id_too(make_api: MakeApi) -> None:
    async with client_of(make_api().app(("k",))) as client:
        first, second = [await client.get("/v1/models") for _ in range(2)]
    assert first.status_code == 401
    assert first.headers["x-request-id"] != second.headers["x-request-id"]


async def test_it_is_the_answers_id(make_api: MakeApi) -> None:
    async with client_of(make_api().app()) as client:
        headers = {"x-request-id": "mine"}
        reply = await client.post("/v1/chat/completions", json=CHAT, headers=headers)
        assert reply.json()["id"] == "chatcmpl-mine"
        reply = await client.post("/v1/completions", json={"prompt": [5]}, headers=headers)
        assert reply.json()["id"] == "cmpl-mine"


async def test_one_access_record_per_request(make_api: MakeApi) -> None:
    api = make_api("a very private answer")
    with logged(JsonLines()) as sink:
        async with client_of(api.app()) as client:
            body = {**CHAT, "n": 2, "stream": True}
            await client.post("/v1/chat/completions", json=body, headers={"x-request-id": "one"})
            await client.post("/v1/chat/completions", json={**CHAT, "n": "x"})
            await client.get("/health")
    done, refused = [json.loads(line) for line in sink.getvalue().splitlines()]
    assert {"level", "time"} < set(done)
    assert (done["logger"], done["message"]) == ("conclave.access", "request")
    assert (done["request_id"], done["route"]) == ("one", "/v1/chat/completions")
    assert (done["status"], done["stream"]) == (200, True)
    assert done["prompt_tokens"] == len(api.client.prompts[0])
    assert done["completion_tokens"] == sum(s.emitted for s in api.client.streams)
    assert 0 < done["ttft_seconds"] <= done["duration_seconds"]
    assert done["finish_reasons"] == ["stop", "stop"]
    assert (refused["status"], refused["error_code"]) == (400, "invalid_type")
    assert "private" not in sink.getvalue()


async def test_the_record_of_a_path_that_is_none_of_ours(make_api: MakeApi) -> None:
    with logged(JsonLines()) as sink:
        async with client_of(make_api().app()) as client:
            await client.get("/nowhere")
            await client.get("/v1/completions")
    records = [json.loads(line) for line in sink.getvalue().splitlines()]
    assert [(record["status"], record["error_code"]) for record in records] == [
        (404, "not_found"),
        (405, "method_not_allowed"),
    ]


async def test_nothing_of_a_request_is_logged_but_its_figures(make_api: MakeApi) -> None:
    api = make_api("a very private answer", error=RuntimeError("boom"))
    api.client.script = lambda prompt, sampling: [70, 71]
    with logged(TextLines(), logging.DEBUG) as sink:
        async with client_of(api.app()) as client:
            headers = {"x-request-id": "abc"}
            for stream in (True, False):
                body = {**CHAT, "stream": stream}
                await client.post("/v1/chat/completions", json=body, headers=headers)
            await client.post("/v1/chat/completions", json={"messages": SECRET}, headers=headers)
    text = sink.getvalue()
    assert "private" not in text
    assert "RuntimeError: boom" in text
    lines = [line for line in text.splitlines() if " conclave." in line]
    assert len(lines) == 5, "two failures, three requests"
    assert all("request_id=abc" in line for line in lines)


async def test_a_client_that_left_is_recorded_as_gone(make_api: MakeApi) -> None:
    api = make_api(ids=[70] * 200, delay=0.02)
    with logged(JsonLines()) as sink:
        async with client_of(api.app()) as client:
            body = {"prompt": [5], "max_tokens": 200}
            asking = asyncio.create_task(client.post("/v1/completions", json=body))
            while not api.client.streams or not api.client.streams[0].emitted:
                await asyncio.sleep(0.01)
            asking.cancel()
            await asyncio.wait((asking,))
    [record] = [json.loads(line) for line in sink.getvalue().splitlines()]
    assert (record["status"], record["client_gone"]) == (499, True)
    assert record["completion_tokens"] > 0


def test_json_lines_are_whole_whatever_is_logged() -> None:
    token = request_id.set('quo"te')
    with logged(JsonLines()) as sink:
        try:
            raise ValueError("two\nlines")
        except ValueError:
            logging.getLogger("conclave.x").exception("it %s\n\ud800", "broke")
    request_id.reset(token)
    [line] = sink.getvalue().splitlines()
    record = json.loads(line)
    assert record["message"] == "it broke\n\ud800"
    assert record["request_id"] == 'quo"te'
    assert "ValueError: two\nlines" in record["exception"]


@pytest.mark.parametrize("formatter", [TextLines(), JsonLines()])
def test_tracebacks_are_whole_where_print_is_replaced(
    formatter: logging.Formatter, monkeypatch: pytest.MonkeyPatch
) -> None:
    try:
        raise ValueError("broken")
    except ValueError as error:
        expected = "".join(traceback.format_exception(error))
        monkeypatch.setattr("builtins.print", lambda *args, **kwargs: None)
        with logged(formatter) as sink:
            logging.getLogger("conclave.x").exception("it broke")
    shown = sink.getvalue()
    if isinstance(formatter, JsonLines):
        shown = json.loads(shown)["exception"]
    assert shown.rstrip().endswith(expected.rstrip())
    assert expected.startswith("Traceback")
    assert "in test_tracebacks" in expected


def test_both_formats_can_be_chosen(capsys: pytest.CaptureFixture[str]) -> None:
    logger = logging.getLogger("conclave")
    kept, logger.handlers, propagate = logger.handlers, [], logger.propagate
    try:
        for log_format in ("text", "json"):
            logger.handlers = []
            log_to_stderr(logging.WARNING, log_format)
            logging.getLogger("conclave.x").warning("hello")
    finally:
        logger.handlers, logger.propagate = kept, propagate
        logger.setLevel(logging.NOTSET)
    text, line = capsys.readouterr().err.splitlines()
    assert text.endswith(" WARNING conclave.x: hello")
    assert json.loads(line)["message"] == "hello"


async def test_ids_of_requests_at_the_same_time_do_not_mix(make_api: MakeApi) -> None:
    api = make_api("Hello there", delay=0.002)
    with logged(JsonLines()) as sink:
        async with client_of(api.app()) as client:

            async def ask(name: str) -> httpx.Response:
                headers = {"x-request-id": name}
                return await client.post("/v1/chat/completions", json=CHAT, headers=headers)

            names = [f"request-{n}" for n in range(20)]
            replies = await asyncio.gather(*map(ask, names))
    assert [reply.json()["id"] for reply in replies] == [f"chatcmpl-{name}" for name in names]
    records = [json.loads(line) for line in sink.getvalue().splitlines()]
    assert sorted(r["request_id"] for r in records) == sorted(names)
