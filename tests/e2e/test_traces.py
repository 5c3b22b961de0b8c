"""A whole server's traces: its spans at a collector, a worker's death in one, a dead collector."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.collector import CollectedSpan, Collector, children, collecting
from tests.e2e.conftest import Server, serving, wait_until

pytestmark = pytest.mark.e2e
CALLER = "00f067aa0ba902b7"
SECRET = "zanzibar"
TREE = {"queue": [], "prefill": ["dispatch"], "decode": ["dispatch"]}


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with collecting() as running:
        yield running


@pytest.fixture(scope="module")
def server(collector: Collector, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log: Path = tmp_path_factory.mktemp("traces") / "server.log"
    options = ("--stages", "2", "--expert-shards", "2", "--otlp-endpoint", collector.url)
    # Only who asks for it is traced.
    with serving(log, "nano-jamba", *options, "--trace-sample-ratio", "0") as running:
        yield running


def asked(trace: int, *, sampled: bool = True) -> dict[str, str]:
    return {"traceparent": f"00-{trace:032x}-{CALLER}-{sampled:02x}", "x-request-id": f"r{trace}"}


def chat(**options: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": f"Is {SECRET} far? What is 20 + 15?"}]
    return {"messages": messages, "temperature": 0, "ignore_eos": True, **options}


def spans_of(collector: Collector, trace: int) -> list[CollectedSpan]:
    """Those of one trace, once its request's own span has come, which is the last to end."""

    def has_come(spans: list[CollectedSpan]) -> bool:
        return any(s.trace_id == f"{trace:032x}" and s.parent_id == CALLER for s in spans)

    return [s for s in collector.wait_for(has_come) if s.trace_id == f"{trace:032x}"]


def check_tree(spans: list[CollectedSpan]) -> CollectedSpan:
    """The request's span, whose tree it is."""
    [request] = [span for span in spans if span.parent_id == CALLER]
    assert request.name == "conclave.request"
    below = children(spans, request)
    tree = {s.name: [child.name for child in children(spans, s)] for s in below}
    assert tree == TREE
    by_id = {span.span_id: span for span in spans}
    for span in spans:
        parent = by_id.get(span.parent_id, request)
        assert parent.began <= span.began <= span.ended <= parent.ended, (parent, span)
    return request


def test_the_tree_of_a_request(server: Server, collector: Collector) -> None:
    with httpx.Client(base_url=server.url, timeout=60) as http:
        replies = [
            http.post("/v1/chat/completions", json=chat(max_tokens=9), headers=headers)
            for headers in ({}, asked(1, sampled=False), asked(2))
        ]
        replica = http.get("/v1/experts").json()["replica_id"]
    assert {reply.status_code for reply in replies} == {200}
    usage = replies[2].json()["usage"]
    spans = spans_of(collector, 2)
    request = check_tree(spans)
    assert len(spans) == len(collector.spans) == 6, "those of nobody else"
    assert request.resource["service.instance.id"] == replica
    assert request.attributes["conclave.request_id"] == "r2"
    assert request.attributes["gen_ai.usage.input_tokens"] == usage["prompt_tokens"]
    assert request.attributes["gen_ai.usage.output_tokens"] == 9
    [decode] = [span for span in spans if span.name == "decode"]
    assert decode.attributes["conclave.steps"] == decode.attributes["conclave.tokens"] == 8
    assert len(decode.attributes["conclave.stage_seconds"]) == 2
    text = replies[2].json()["choices"][0]["message"]["content"]
    assert text
    for body in collector.bodies:
        assert SECRET.encode() not in body
        assert text.encode() not in body


def test_a_death_is_an_event(server: Server, collector: Collector) -> None:
    with httpx.Client(base_url=server.url, timeout=120) as http:
        actors = http.get("/v1/experts").json()["actors"]
        [engine] = [actor["pid"] for actor in actors if actor["role"] == "engine"]
        body = chat(max_tokens=200, stream=True)
        lines = []
        with http.stream("POST", "/v1/chat/completions", json=body, headers=asked(3)) as reply:
            for line in reply.iter_lines():
                lines.append(line)
                if len(lines) == 10:
                    os.kill(engine, signal.SIGKILL)
    assert "data: [DONE]" in lines
    spans = spans_of(collector, 3)
    request = check_tree(spans)
    assert request.attributes["gen_ai.usage.output_tokens"] == 200
    assert request.attributes["gen_ai.response.finish_reasons"] == ["length"]
    assert "restart" in [name for name, _, _ in request.events]
    [decode] = [span for span in spans if span.name == "decode"]
    assert decode.attributes["conclave.tokens"] > 199, "what was known is computed again"


def test_a_dead_collector_disturbs_nobody(server: Server, collector: Collector) -> None:
    collector.status = 400
    with httpx.Client(base_url=server.url, timeout=60) as http:
        for trace in range(4, 10):
            reply = http.post("/v1/chat/completions", json=chat(max_tokens=3), headers=asked(trace))
            assert reply.json()["usage"]["completion_tokens"] == 3

        def dropped() -> float:
            text = http.get("/metrics").text
            found = re.search(
                r"^conclave_trace_spans_dropped_total\{.*\} (.+)$", text, re.MULTILINE
            )
            assert found is not None
            return float(found[1])

        assert wait_until(lambda: dropped() == 6 * 6, 20)
        assert http.get("/health").json() == {"state": "ready"}
        assert json.loads(http.get("/ready").text) == {"state": "ready"}
