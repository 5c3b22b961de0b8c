"""Streams in time: when they begin, how they stay alive, and clients that leave or read slowly."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import openai
import pytest
from starlette.requests import ClientDisconnect

from deploy.demo import nano_checkpoint
from deploy.event_stream import EventStream
from deploy.patient_stream import PatientStream
from router.step import NOTHING, Token
from shards import stream as group_stream
from shards.client import ReaderTooSlow, SequenceRefused
from shards.outputs import Outputs
from shards.stream import GroupStream
from tests.deploy.conftest import ScriptedStream, running_service
from tests.deploy.http_client import post
from tests.deploy.open_streams import Connection, Steps, at_rest, listening

MakeApi = Callable[..., Any]
USER: Any = [{"role": "user", "content": "Hi"}]
STREAM = {"messages": USER, "stream": True}


def parts(text: str) -> tuple[int, list[str]]:
    """How many comments there are, and the events in order."""
    found = [part for part in text.split("\n\n") if part]
    comments = [part for part in found if part.startswith(":")]
    assert set(comments) <= {": keep-alive"}
    return len(comments), [part for part in found if not part.startswith(":")]


def shape(events: list[str]) -> list[Any]:
    """What the chunks say, without ids and times."""
    assert events[-1] == "data: [DONE]"
    return [json.loads(event[6:])["choices"] for event in events[:-1]]


async def test_a_stream_says_that_it_lives_while_nothing_comes(make_api: MakeApi) -> None:
    quick = make_api("Hello")
    comments, expected = parts((await post(quick, "/v1/chat/completions", STREAM)).text)
    assert comments == 0
    slow = make_api("Hello", delay=0.2)
    slow.service.keep_alive_s = 0.05
    reply = await post(slow, "/v1/chat/completions", STREAM)
    assert reply.text.startswith(": keep-alive\n\n")
    comments, events = parts(reply.text)
    tokens = slow.client.streams[0].emitted
    assert comments > tokens > 1, "before the first and between the others"
    assert shape(events) == shape(expected)


async def test_the_openai_client_skips_the_comments(make_api: MakeApi) -> None:
    api = make_api("Hello there", delay=0.05)
    api.service.keep_alive_s = 0.01
    async with listening(api.service) as port:
        client = openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="k")
        stream = await client.chat.completions.create(
            model="nano-jamba", messages=USER, stream=True
        )
        text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
    assert text == "Hello there"


class LateRefusal(ScriptedStream):
    """Waits in the queue before it is refused."""

    async def __aiter__(self) -> AsyncIterator[Token]:
        await asyncio.sleep(0.1)
        raise SequenceRefused("too long")
        yield


@pytest.mark.parametrize(("patience", "status"), [(5.0, 400), (0.02, 200)])
async def test_a_refusal_is_a_plain_error_unless_the_stream_had_to_begin(
    make_api: MakeApi, patience: float, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.deploy.conftest.ScriptedStream", LateRefusal)
    api = make_api()
    api.service.keep_alive_s = patience
    reply = await post(api, "/v1/chat/completions", STREAM)
    assert reply.status_code == status
    if status == 400:
        assert reply.json()["error"]["code"] == "sequence_refused"
    else:
        comments, events = parts(reply.text)
        assert comments >= 1
        assert len(events) == 2
        assert json.loads(events[0][6:])["error"]["code"] == "sequence_refused"
        assert events[1] == "data: [DONE]"
    assert api.service._admission.live == 0


@dataclass
class GatedStream(ScriptedStream):
    """Emits a token whenever the test lets it."""

    gate: ClassVar[asyncio.Semaphore]

    async def __aiter__(self) -> AsyncIterator[Token]:
        async for token in super().__aiter__():
            await self.gate.acquire()
            yield token


@pytest.mark.parametrize("token_ids", [True, False])
async def test_streams_come_token_by_token_without_a_tokenizer(
    make_api: MakeApi, token_ids: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.deploy.conftest.ScriptedStream", GatedStream)
    GatedStream.gate = asyncio.Semaphore(1)
    api = make_api(ids=[70, 71, 72, 73])
    api.service._model = replace(api.model, tokenizer=None)
    body = {"prompt": [5], "max_tokens": 4, "stream": True, "return_token_ids": token_ids}
    async with listening(api.service) as port:
        connection = await Connection.post(port, "/v1/completions", body)
        seen = []
        async for line in connection.lines():
            if line != b"data: [DONE]":
                seen.append(json.loads(line[6:])["choices"][0])
                GatedStream.gate.release()  # the next token comes only now
    assert [choice["text"] for choice in seen] == [""] * 4
    assert [choice["finish_reason"] for choice in seen] == [None, None, None, "length"]
    if token_ids:
        assert [choice["token_ids"] for choice in seen] == [[70], [71], [72], [73]]


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_leaves_aborts_within_a_step(
    stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = Steps(monkeypatch)
    body = {"prompt": [5, 6, 7], "n": 3, "max_tokens": 480, "ignore_eos": True, "stream": stream}
    with running_service(nano_checkpoint("nano-phimoe")) as service:
        async with listening(service) as port:
            connection = await Connection.post(port, "/v1/completions", body)
            async with asyncio.timeout(30):
                while len(steps.before) < 3 or min(steps.before.values()) < 5:
                    await asyncio.sleep(0.01)
            connection.leave()
            await at_rest(service)
            load = service._client.load
            assert service._admission.live == 0
            metrics = service.metrics.text().decode()
    assert 'requests_total{replica_id="",route="/v1/completions",status="499"} 1.0' in metrics
    assert 'queue_time_seconds_count{replica_id=""} 3.0' in metrics
    steps.assert_aborted_within_a_step(3, 480)
    assert (load.used_slots, load.running, load.waiting) == (0, 0, 0)


def make_group_stream(aborted: list[bool]) -> GroupStream:
    return GroupStream(lambda: aborted.append(True), Outputs(NOTHING, 1))


async def test_a_client_that_is_gone_before_the_headers_aborts_too(make_api: MakeApi) -> None:
    api = make_api(ids=[70] * 99)
    stream = await api.service.completions({"prompt": [5], "max_tokens": 99, "stream": True})
    assert isinstance(stream, PatientStream)

    async def send(message: Any) -> None:
        raise OSError("broken pipe")

    async def no_events() -> AsyncGenerator[bytes, None]:
        yield b""

    response = EventStream(no_events(), stream, 15.0)
    with pytest.raises(ClientDisconnect):
        await response({"type": "http"}, asyncio.Event().wait, send)  # type: ignore[arg-type]
    assert api.client.streams[0].aborted
    assert api.service._admission.live == 0


async def test_nothing_spins_while_a_client_does_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    async def no_chunks() -> AsyncGenerator[Any, None]:
        for chunk in ():
            yield chunk

    async def one_event() -> AsyncGenerator[bytes, None]:
        await asyncio.sleep(0.05)
        yield b"data: 1\n\n"

    blocked, freed, naps = asyncio.Event(), asyncio.Event(), []
    plain_sleep = asyncio.sleep

    async def sleep(seconds: float) -> None:
        if blocked.is_set():
            naps.append(seconds)
        await plain_sleep(max(seconds, 0.001))

    async def send(message: Any) -> None:
        if message.get("body", b"").startswith(b"data"):
            blocked.set()
            await freed.wait()

    monkeypatch.setattr("deploy.event_stream.asyncio.sleep", sleep)
    response = EventStream(one_event(), PatientStream(no_chunks()), 0.02)
    never = asyncio.Event().wait
    answering = asyncio.create_task(response({"type": "http"}, never, send))  # type: ignore[arg-type]
    while len(naps) < 3:
        await plain_sleep(0.01)
    freed.set()
    await answering
    assert min(naps) > 0


async def test_what_waits_for_a_reader_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group_stream, "MAX_BEHIND", 5)
    aborted: list[bool] = []
    stream = make_group_stream(aborted)
    tokens = [Token(seq_id=1, position=i, token_id=i) for i in range(9)]
    for token in tokens[:5]:
        stream.put(token)
    assert not aborted
    for token in tokens[5:]:
        stream.put(token)
    assert aborted == [True]
    reading = aiter(stream)
    assert [await anext(reading) for _ in range(5)] == tokens[:5]
    with pytest.raises(ReaderTooSlow):
        await anext(reading)


async def test_a_reader_in_time_is_never_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group_stream, "MAX_BEHIND", 5)
    aborted: list[bool] = []
    stream = make_group_stream(aborted)
    tokens = aiter(stream)
    for position in range(100):
        stream.put(Token(seq_id=1, position=position, token_id=position))
        if position >= 4:
            assert (await anext(tokens)).position == position - 4
    assert not aborted


async def test_a_slow_reader_stalls_nobody_and_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group_stream, "MAX_BEHIND", 50)
    body = {"prompt": [5, 6, 7], "max_tokens": 480, "ignore_eos": True, "temperature": 0}
    slow_body = {**body, "n": 2, "stream": True, "logprobs": 5, "temperature": 1}
    with running_service(nano_checkpoint("nano-phimoe")) as service:
        async with listening(service, send_buffer=4096) as port:
            slow = await Connection.post(port, "/v1/completions", slow_body, receive_buffer=4096)
            while service._client.load.running == 0:
                await asyncio.sleep(0.01)
            quick_body = {**body, "max_tokens": 100}
            quick = await Connection.post(port, "/v1/completions", {**quick_body, "stream": True})
            text = "".join(event["choices"][0]["text"] for event in await quick.events())
            whole = await Connection.post(port, "/v1/completions", quick_body)
            reply = (await whole.reader.read()).split(b"\r\n\r\n", 1)[1]
            assert json.loads(reply)["choices"][0]["text"] == text
            # Nobody has read a byte of it, and yet its sequences are gone.
            await at_rest(service)
            *chunks, error = await slow.events()
    assert error["error"]["code"] == "client_too_slow"
    assert len(chunks) < 2 * 480
