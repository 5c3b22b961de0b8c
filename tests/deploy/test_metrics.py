"""/metrics: what is counted, under which names, and whose words never become labels."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from deploy.handle_calls import HandleCalls
from deploy.http_api import build_api
from router.layer_totals import LayerTotals
from router.step import EngineLoad
from shards.client import SequenceRefused, WorkerStatus
from shards.logs import JsonLines
from tests.deploy.conftest import running_service
from tests.deploy.http_client import client_of, post
from tests.deploy.test_request_log import logged
from tests.tiny import write_tiny

USER = [{"role": "user", "content": "Hi"}]
MakeApi = Callable[..., Any]
Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


async def scrape(api: Any) -> Samples:
    """Every sample, without its replica_id, which all must have."""
    async with client_of(api.app()) as client:
        response = await client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    found: Samples = {}
    for family in text_string_to_metric_families(response.text):
        for sample in family.samples:
            labels = dict(sample.labels)
            assert labels.pop("replica_id") == "r1", sample
            found[sample.name, frozenset(labels.items())] = sample.value
    return found


def at(samples: Samples, name: str, **labels: str) -> float:
    return samples[f"conclave_{name}", frozenset(labels.items())]


async def test_a_stream_is_counted_token_by_token(make_api: MakeApi) -> None:
    api = make_api("Hello there")
    before = await scrape(api)
    assert at(before, "generation_tokens_total") == 0
    for stream in (True, False):
        body = {"messages": USER, "n": 2, "stream": stream}
        assert (await post(api, "/v1/chat/completions", body)).status_code == 200
    after = await scrape(api)
    emitted = [stream.emitted for stream in api.client.streams]
    assert len(emitted) == 4
    assert at(after, "generation_tokens_total") == sum(emitted)
    # A prompt counts once per request, however many answers it gets.
    assert at(after, "prompt_tokens_total") == 2 * len(api.client.prompts[0])
    assert at(after, "time_to_first_token_seconds_count") == 2
    assert at(after, "inter_token_latency_seconds_count") == sum(n - 1 for n in emitted)
    assert at(after, "queue_time_seconds_count") == 4
    assert at(after, "queue_time_seconds_sum") == 4 * 0.25
    route = "/v1/chat/completions"
    assert at(after, "requests_total", route=route, status="200") == 2
    assert at(after, "request_duration_seconds_count", route=route) == 2


async def test_times_are_those_of_the_tokens(make_api: MakeApi) -> None:
    api = make_api("Hello there", delay=0.05)
    await post(api, "/v1/chat/completions", {"messages": USER})
    samples = await scrape(api)
    gaps = api.client.streams[0].emitted - 1
    assert at(samples, "time_to_first_token_seconds_sum") >= 0.05
    assert at(samples, "inter_token_latency_seconds_sum") >= 0.05 * gaps
    assert at(samples, "inter_token_latency_seconds_bucket", le="0.03") == 0
    assert at(samples, "request_duration_seconds_sum", route="/v1/chat/completions") >= 0.05 * gaps


async def test_what_the_instance_counts(make_api: MakeApi) -> None:
    api = make_api()
    api.client.load = EngineLoad(
        running=3, waiting=2, used_blocks=5, total_blocks=9, used_slots=1, total_slots=4,
        used_snapshots=6, total_snapshots=8, preemptions=7, prefix_tokens=100, prefix_hit_tokens=40,
    )  # fmt: skip
    totals = LayerTotals(
        exchanges=10, calls=20, resends=1, sent_bytes=300, received_bytes=400, seconds=0.5,
        tokens=[0, 12],
    )  # fmt: skip
    api.client.layer_totals = {2: totals}
    samples = await scrape(api)
    expected = {
        "sequences_running": 3, "sequences_waiting": 2, "kv_cache_blocks_used": 5,
        "kv_cache_blocks": 9, "state_slots_used": 1, "state_slots": 4, "state_snapshots_used": 6,
        "state_snapshots": 8, "preemptions_total": 7, "prefix_tokens_total": 100,
        "prefix_hit_tokens_total": 40,
    }  # fmt: skip
    assert {name: at(samples, name) for name in expected} == expected
    assert at(samples, "dispatch_latency_seconds_count", layer="2") == 10
    assert at(samples, "dispatch_latency_seconds_sum", layer="2") == 0.5
    assert at(samples, "dispatch_bytes_total", layer="2", direction="sent") == 300
    assert at(samples, "dispatch_bytes_total", layer="2", direction="received") == 400
    assert at(samples, "dispatch_calls_total", layer="2") == 20
    assert at(samples, "dispatch_resends_total", layer="2") == 1
    assert at(samples, "expert_tokens_total", layer="2", expert="1") == 12
    assert at(samples, "instance_state", state="ready") == 1
    assert at(samples, "instance_state", state="recovering") == 0
    assert at(samples, "actor_deaths_total", role="expert", index="1") == 2
    assert at(samples, "actor_recoveries_total", role="expert", index="1") == 1


@pytest.mark.parametrize(
    ("states", "without"),
    [
        (("alive", "alive", "alive"), 0),
        (("starting", "alive", "alive"), 1),  # 0
        (("alive", "backing off", "alive"), 0),
        (("starting", "backing off", "alive"), 2),  # 0 and 1
        (("starting", "starting", "starting"), 4),
    ],
)
async def test_experts_that_nobody_holds(
    states: tuple[str, ...], without: int, make_api: MakeApi
) -> None:
    """Experts 1 and 2 have two copies each."""
    api = make_api()
    held = ((0, 1), (1, 2), (2, 3))
    workers = tuple(
        WorkerStatus(role="expert", index=i, pid=1, node_id="n", state=state, experts=held[i])
        for i, state in enumerate(states)
    )
    api.client.workers = lambda: workers
    assert at(await scrape(api), "experts_without_copy") == without


async def test_a_clients_words_never_become_labels(make_api: MakeApi) -> None:
    api = make_api()
    word = "zebra"
    async with client_of(api.app(("key",))) as client:
        await client.get("/v1/models")
    async with client_of(api.app()) as client:
        await client.get(f"/{word}")
        await client.get(f"/v1/models/{word}")
        await client.request(word.upper(), "/v1/models")
        await client.post("/v1/completions", json={"prompt": "x", "model": word, word: 1})
        await client.post("/v1/completions", json={word: word}, headers={"x-request-id": word})
        text = (await client.get("/metrics")).text
    assert word not in text.lower()
    samples = await scrape(api)
    assert at(samples, "requests_total", route="other", status="404") == 1
    assert at(samples, "requests_total", route="/v1/models", status="401") == 1
    assert at(samples, "requests_total", route="/v1/models", status="405") == 1
    assert at(samples, "errors_total", code="not_found") == 1
    assert at(samples, "errors_total", code="method_not_allowed") == 1
    assert at(samples, "errors_total", code="model_not_found") == 2
    assert at(samples, "errors_total", code="invalid_api_key") == 1
    # Only this request itself is still under way.
    assert at(samples, "requests_in_progress") == 1


async def test_refusals_and_errors_inside_a_stream(make_api: MakeApi) -> None:
    api = make_api(ids=[70] * 99, max_num_seqs=1, delay=0.05)
    body = {"prompt": [5], "max_tokens": 99, "n": 17}
    waiting = asyncio.create_task(post(api, "/v1/completions", body))
    while not api.client.streams:
        await asyncio.sleep(0.01)
    refused = await post(api, "/v1/completions", {"prompt": [5]})
    code = refused.json()["error"]["code"]
    waiting.cancel()
    await asyncio.wait((waiting,))
    samples = await scrape(api)
    assert at(samples, "admission_refusals_total", code=code) == 1
    assert at(samples, "requests_total", route="/v1/completions", status="499") == 1

    api = make_api(ids=[70, 71], error=SequenceRefused("the engine says no"))
    reply = await post(api, "/v1/completions", {"prompt": [5], "stream": True, "max_tokens": 9})
    assert reply.status_code == 200
    assert at(await scrape(api), "errors_total", code="sequence_refused") == 1


async def test_prompts_that_are_not_continued_count_too(tmp_path: Path) -> None:
    with running_service(write_tiny("jamba", tmp_path, classifier=True)) as service:
        with logged(JsonLines()) as sink:
            async with client_of(build_api(service)) as client:
                body = {"input": [[5, 6, 7], [8, 9]]}
                reply = await client.post("/v1/classify", json=body)
                assert reply.json()["usage"]["prompt_tokens"] == 5
            answer = await HandleCalls(service).answer("forward", {"input_ids": [[5, 6, 7, 8]]})
            assert answer["logits"].shape[0] == 1
        text = service.metrics.text().decode()
    records = [json.loads(line) for line in sink.getvalue().splitlines()]
    assert [(each["route"], each["prompt_tokens"]) for each in records] == [
        ("/v1/classify", 5),
        ("handle.forward", 4),
    ]
    assert 'conclave_prompt_tokens_total{replica_id=""} 9.0' in text
    assert 'conclave_queue_time_seconds_count{replica_id=""} 3.0' in text


async def test_the_documentation_lists_every_metric(make_api: MakeApi) -> None:
    api = make_api()
    api.client.layer_totals = {2: LayerTotals(exchanges=1, tokens=[1])}
    await post(api, "/v1/completions", {"prompt": [5]})
    await post(api, "/v1/completions", {"prompt": []})
    page = (Path(__file__).parents[2] / "docs" / "observability.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \|([^|]*)\| (.+) \|$", page, re.MULTILINE)
    documented = {name: (kind, meaning) for name, kind, _, meaning in rows}
    shown = {}
    for family in api.service.metrics.registry.collect():
        name = f"{family.name}_total" if family.type == "counter" else family.name
        shown[name] = (family.type, family.documentation)
    assert documented == shown
    labels = {name: set(re.findall(r"`(\w+)`", cell)) for name, _, cell, _ in rows}
    for family in api.service.metrics.registry.collect():
        name = f"{family.name}_total" if family.type == "counter" else family.name
        for sample in family.samples:
            assert set(sample.labels) - {"replica_id", "le"} == labels[name], sample
    assert all(re.search(r"^[a-z_]+$", name) for name in shown)
