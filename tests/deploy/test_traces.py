"""Traces of requests, from real workers to a collector: every span, and what never is in one."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from deploy.demo import nano_checkpoint
from deploy.handle_calls import HandleCalls
from deploy.http_api import build_api
from deploy.request_trace import MAX_SEQUENCES
from deploy.service import ApiService
from deploy.trace_options import TraceOptions
from deploy.tracing import Tracing
from shards.logs import JsonLines, TextLines
from shards.sequence_trace import MAX_EVENTS
from tests.collector import CollectedSpan, Collector, children, collecting
from tests.deploy.conftest import running_service
from tests.deploy.http_client import client_of
from tests.deploy.test_request_log import logged
from tests.e2e.conftest import free_port

FOLDER = nano_checkpoint("nano-jamba")
CONFIG = json.loads((FOLDER / "config.json").read_text())
TRACE, CALLER = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
SAMPLED = {"traceparent": f"00-{TRACE}-{CALLER}-01", "tracestate": "vendor=opaque"}
UNSAMPLED = {"traceparent": f"00-{TRACE}-{CALLER}-00"}
SECRET = "zanzibar"
CHAT = {
    "messages": [{"role": "user", "content": f"Is {SECRET} far? What is 20 + 15?"}],
    "temperature": 0,
    "max_tokens": 8,
    "ignore_eos": True,
}
GREEDY = {"temperature": 0, "ignore_eos": True}


@dataclass
class Traced:
    """A service whose traces come to a collector."""

    collector: Collector
    tracing: Tracing
    service: ApiService
    raw: bytes = b""
    """What `spans` has read."""

    async def spans(self) -> list[CollectedSpan]:
        """Everything that was sent since the last time."""
        assert await asyncio.to_thread(self.tracing.flush)
        spans = self.collector.spans
        self.raw = b"".join(self.collector.bodies)
        self.collector.bodies.clear()
        return spans

    async def post(
        self, path: str, body: Any, headers: dict[str, str] | list[tuple[str, str]] | None = None
    ) -> httpx.Response:
        async with client_of(build_api(self.service)) as client:
            return await client.post(path, json=body, headers=headers)


@contextmanager
def traced_service(
    folder: Path = FOLDER, *, ratio: float = 1.0, **options: Any
) -> Iterator[Traced]:
    with collecting() as collector:
        asked = TraceOptions(endpoint=collector.url, sample_ratio=ratio)
        tracing = Tracing(asked, model="tiny", replica_id="r1")
        with running_service(folder, tracing=tracing, **options) as service:
            yield Traced(collector, tracing, service)
        tracing.close()


@pytest.fixture(scope="module", params=["actor", "direct"])
def spread(request: pytest.FixtureRequest) -> Iterator[Traced]:
    """Two stages and two expert workers."""
    with traced_service(stages=2, expert_shards=2, dispatch=request.param) as traced:
        yield traced


@pytest.fixture(scope="module")
def small() -> Iterator[Traced]:
    """The whole model in the engine."""
    with traced_service() as traced:
        yield traced


def the(spans: list[CollectedSpan], name: str) -> CollectedSpan:
    [found] = [span for span in spans if span.name == name]
    return found


def check_nesting(spans: list[CollectedSpan]) -> None:
    """Each within its parent, except those whose parent is the caller's."""
    by_id = {span.span_id: span for span in spans}
    assert len(by_id) == len(spans)
    for span in spans:
        assert span.began <= span.ended
        for _, at, _ in span.events:
            assert span.began <= at <= span.ended, span
        parent = by_id.get(span.parent_id)
        assert (parent is None) == (span.name == "conclave.request"), span
        if parent is not None:
            assert parent.trace_id == span.trace_id
            assert parent.began <= span.began <= span.ended <= parent.ended, (parent, span)


def moe_layers() -> list[int]:
    period, offset = CONFIG["expert_layer_period"], CONFIG["expert_layer_offset"]
    return [i for i in range(CONFIG["num_hidden_layers"]) if i % period == offset]


async def test_the_whole_tree_of_a_request(spread: Traced) -> None:
    before = time.time_ns()
    reply = await spread.post("/v1/chat/completions", CHAT, {**SAMPLED, "x-request-id": "mine"})
    after = time.time_ns()
    usage = reply.json()["usage"]
    spans = await spread.spans()
    check_nesting(spans)
    request = the(spans, "conclave.request")
    assert {span.trace_id for span in spans} == {TRACE}
    assert request.parent_id == CALLER
    assert request.trace_state == "vendor=opaque"
    assert before <= request.began < request.ended <= after
    assert request.resource["service.name"] == "conclave"
    assert request.resource["service.instance.id"] == "r1"
    assert request.resource["conclave.model"] == "tiny"
    told = request.attributes
    assert told.pop("conclave.time_to_first_token_seconds") > 0
    assert told == {
        "http.route": "/v1/chat/completions",
        "http.response.status_code": 200,
        "conclave.request_id": "mine",
        "conclave.sequences": 1,
        "gen_ai.usage.input_tokens": usage["prompt_tokens"],
        "gen_ai.usage.output_tokens": 8,
        "gen_ai.response.finish_reasons": ["length"],
    }
    below = children(spans, request)
    assert [span.name for span in below] == ["queue", "prefill", "decode"]
    queue, prefill, decode = below
    assert queue.ended == prefill.began
    assert prefill.ended == decode.began
    # One, or two where the state at the last full block is worth a snapshot.
    assert 1 <= prefill.attributes["conclave.steps"] <= 2
    check_phase(spans, prefill, tokens=usage["prompt_tokens"])
    assert prefill.attributes["conclave.prompt_tokens"] == usage["prompt_tokens"]
    assert decode.attributes["conclave.steps"] == 7
    check_phase(spans, decode, tokens=7)
    assert len(spans) == 6
    assert SECRET.encode() not in spread.raw


def check_phase(spans: list[CollectedSpan], phase: CollectedSpan, *, tokens: int) -> None:
    told = phase.attributes
    steps = told["conclave.steps"]
    assert told["conclave.tokens"] == tokens
    assert told["conclave.batch_tokens"] == tokens, "it was alone"
    lasted = (phase.ended - phase.began) / 1e9
    assert len(told["conclave.stage_seconds"]) == 2
    assert all(value > 0 for value in told["conclave.stage_seconds"])
    assert 0 < told["conclave.slowest_step_seconds"] <= lasted + 1e-6
    assert [name for name, _, _ in phase.events] == ["step"] * steps
    assert sum(event["conclave.tokens"] for _, _, event in phase.events) == tokens
    [dispatch] = children(spans, phase)
    assert dispatch.name == "dispatch"
    assert dispatch.began == phase.began
    layers = moe_layers()
    told = dispatch.attributes
    assert told["conclave.dispatch.layers"] == layers
    # Each token's row, to each of its experts and back.
    row_bytes = CONFIG["num_experts_per_tok"] * CONFIG["hidden_size"] * 4
    assert told["conclave.dispatch.layer_bytes"] == [2 * tokens * row_bytes] * len(layers)
    assert told["conclave.dispatch.bytes"] == 2 * tokens * row_bytes * len(layers)
    assert told["conclave.dispatch.exchanges"] >= steps * len(layers)
    assert all(value > 0 for value in told["conclave.dispatch.layer_microseconds"])
    busy = (dispatch.ended - dispatch.began) / 1e3
    assert 0 < busy <= told["conclave.dispatch.microseconds"] + len(layers)


async def test_the_documentation_lists_every_attribute(spread: Traced) -> None:
    await spread.post(
        "/v1/completions", {"prompt": [5, 6], "n": 2, "max_tokens": 2, "stream": True}
    )
    await spread.post("/v1/completions", {"prompt": []})
    page = (Path(__file__).parents[2] / "docs" / "traces.md").read_text()
    for span in await spread.spans():
        [row] = [line for line in page.splitlines() if line.startswith(f"| `{span.name}` |")]
        for key in span.attributes:
            # Decoding's row points to the prefill's.
            name = key.removeprefix("conclave.")
            assert f"`{name}`" in row or (span.name == "decode" and f"`{name}`" in page), key


async def test_answers_do_not_depend_on_it(spread: Traced) -> None:
    texts = [
        (await spread.post("/v1/chat/completions", CHAT, headers)).json()["choices"][0]["message"]
        for headers in (SAMPLED, UNSAMPLED)
    ]
    assert texts[0] == texts[1]
    assert {span.trace_id for span in await spread.spans()} == {TRACE}


async def test_sequences_of_a_request(spread: Traced) -> None:
    body = {"prompt": [[5, 6], [7, 8, 9]], "n": 2, "max_tokens": 3, "seed": 1, "ignore_eos": True}
    await spread.post("/v1/completions", body)
    spans = await spread.spans()
    check_nesting(spans)
    request = the(spans, "conclave.request")
    assert request.parent_id == ""
    assert request.attributes["conclave.sequences"] == 4
    assert request.attributes["gen_ai.response.finish_reasons"] == ["length"] * 4
    for name in ("queue", "prefill", "decode"):
        found = [span for span in spans if span.name == name]
        indices = sorted(span.attributes["conclave.sequence.index"] for span in found)
        assert indices == [0, 1, 2, 3]
    await spread.post("/v1/completions", {"prompt": [[5]] * 20, "max_tokens": 2, **GREEDY})
    spans = await spread.spans()
    assert the(spans, "conclave.request").attributes["conclave.sequences"] == 20
    assert len([span for span in spans if span.name == "queue"]) == MAX_SEQUENCES


async def test_long_answers_are_no_longer_traces(small: Traced) -> None:
    await small.post("/v1/completions", {"prompt": [5, 6, 7], "max_tokens": 200, **GREEDY})
    spans = await small.spans()
    check_nesting(spans)
    assert sorted(span.name for span in spans) == ["conclave.request", "decode", "prefill", "queue"]
    decode = the(spans, "decode")
    assert decode.attributes["conclave.steps"] == 199
    assert len(decode.events) == MAX_EVENTS
    assert "conclave.stage_seconds" not in decode.attributes, "there is no stage"


async def test_streams_handles_and_what_is_not_continued(small: Traced) -> None:
    await small.post("/v1/chat/completions", {**CHAT, "stream": True})
    calls = HandleCalls(small.service)
    async for _ in await calls.generate("chat", {**CHAT, "stream": True}):
        pass
    await calls.answer("forward", {"input_ids": [[5, 6, 7]]})
    await calls.answer("tokenize", {"prompt": SECRET})
    spans = await small.spans()
    check_nesting(spans)
    requests = {s.attributes["http.route"]: s for s in spans if s.name == "conclave.request"}
    names = {
        route: [span.name for span in children(spans, request)]
        for route, request in requests.items()
    }
    assert names == {
        "/v1/chat/completions": ["queue", "prefill", "decode"],
        "handle.chat": ["queue", "prefill", "decode"],
        "handle.forward": ["queue", "prefill"],
        "handle.tokenize": [],
    }
    assert requests["handle.chat"].attributes["conclave.stream"] is True
    assert len({span.trace_id for span in requests.values()}) == 4
    assert SECRET.encode() not in small.raw


async def test_errors(small: Traced) -> None:
    headers = {**SAMPLED, "x-request-id": "refused"}
    with logged(JsonLines()) as sink:
        reply = await small.post("/v1/completions", {"prompt": SECRET, "temperature": 99}, headers)
    assert reply.status_code == 400
    [request] = await small.spans()
    assert request.attributes["http.response.status_code"] == 400
    assert request.attributes["error.type"] == reply.json()["error"]["code"]
    assert request.status == 0, "the server did not fail"
    assert json.loads(sink.getvalue())["trace_id"] == TRACE


@pytest.mark.parametrize(
    "parent",
    [
        [("traceparent", "00-0-0-01")],
        [("traceparent", f"00-{'0' * 32}-{CALLER}-01")],
        [("traceparent", f"ff-{TRACE}-{CALLER}-01")],
        [("traceparent", f"00-{TRACE}-{CALLER}-01-more")],
        [("traceparent", SAMPLED["traceparent"]), ("traceparent", UNSAMPLED["traceparent"])],
        [("tracestate", "vendor=opaque")],
        [("traceparent", SECRET * 100)],
    ],
)
async def test_parents_that_are_none(small: Traced, parent: list[tuple[str, str]]) -> None:
    reply = await small.post("/tokenize", {"prompt": "x"}, parent)
    assert reply.status_code == 200
    [request] = await small.spans()
    assert request.parent_id == ""
    assert request.trace_id != TRACE
    assert request.trace_state == ""


async def test_what_is_not_sampled_sends_nothing(small: Traced) -> None:
    body = {"prompt": [5, 6, 7], "max_tokens": 4, **GREEDY}
    assert (await small.post("/v1/completions", body, UNSAMPLED)).status_code == 200
    async with client_of(build_api(small.service)) as client:
        for path in ("/health", "/ready", "/metrics"):
            assert (await client.get(path, headers=SAMPLED)).status_code == 200
    assert await small.spans() == []


async def test_callers_decide_before_chance() -> None:
    body = {"prompt": [5, 6, 7], "max_tokens": 2, **GREEDY}
    with traced_service(ratio=0.0) as traced:
        for headers in (None, UNSAMPLED, SAMPLED):
            assert (await traced.post("/v1/completions", body, headers)).status_code == 200
        spans = await traced.spans()
        assert {span.trace_id for span in spans} == {TRACE}
        assert len(spans) == 4


@pytest.mark.parametrize("status", [None, 400])
async def test_collectors_that_do_not_answer_disturb_nobody(
    monkeypatch: pytest.MonkeyPatch, status: int | None
) -> None:
    # Longer than the exporter waits before it tries again: only then does it say why.
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "2")
    body = {"prompt": [5, 6, 7], "max_tokens": 4, **GREEDY}
    with collecting() as collector, logged(TextLines(), logging.WARNING) as lines:
        collector.status = status or 200
        url = collector.url if status else f"http://127.0.0.1:{free_port()}"
        tracing = Tracing(TraceOptions(endpoint=url), model="tiny", replica_id="r1")
        with running_service(FOLDER, tracing=tracing) as service:
            async with client_of(build_api(service)) as client:
                for _ in range(2):
                    for _ in range(3):
                        reply = await client.post("/v1/completions", json=body)
                        assert reply.json()["usage"]["completion_tokens"] == 4
                    assert await asyncio.to_thread(tracing.flush)
            text = service.metrics.text().decode()
        tracing.close()
    assert 'conclave_trace_spans_dropped_total{replica_id=""} 24.0' in text
    assert lines.getvalue().count("takes no spans") == 1
    assert ("code: 400" if status else "refused") in lines.getvalue()
    assert collector.paths == (["/v1/traces"] * len(collector.paths) if status else [])
