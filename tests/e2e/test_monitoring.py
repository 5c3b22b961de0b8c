"""What alerts and the dashboard ask for is in a scrape of Ray's agent beside a real server."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from deploy.request_record import QUIET_ROUTES
from k8s.dashboards import DASHBOARDS
from k8s.documents import load_documents
from k8s.queries import (
    FROM_DISCOVERY,
    FROM_PROMETHEUS,
    Wanted,
    all_wanted,
    dashboard_expressions,
    rule_expressions,
)
from k8s.render import FOLDER
from shards.logs import RUNTIME_FOLDER
from tests.e2e.conftest import Server, serving, wait_until

pytestmark = pytest.mark.e2e
OPTIONS = ("--stages", "1", "--expert-shards", "2", "--max-num-seqs", "1")
CHAT = {"messages": [{"role": "user", "content": "What is 2 + 3?"}], "max_tokens": 8}
COUNTED = "conclave_generation_tokens_total"


@dataclass(frozen=True)
class Scrape:
    """One answer of an agent: metric → label names, metric and labels → value."""

    labels: dict[str, set[str]]
    values: dict[tuple[str, frozenset[tuple[str, str]]], float]


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, str]]:
    """A server that has answered, streamed, erred and refused; the URL of its node's agent."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_metrics_report_interval_ms", "1000")
        log: Path = tmp_path_factory.mktemp("monitoring") / "server.log"
        with serving(log, "nano-jamba", *OPTIONS) as server:
            with httpx.Client(base_url=server.url, timeout=60) as http:
                answer(http)
            assert asyncio.run(crowd(server)) > 0, "nobody was refused"
            yield server, f"http://127.0.0.1:{agent_port(server)}/metrics"


def answer(http: httpx.Client) -> None:
    for stream in (False, True):
        reply = http.post("/v1/chat/completions", json={**CHAT, "stream": stream})
        assert reply.status_code == 200, reply.text
    assert http.post("/v1/completions", json={"prompt": []}).status_code == 400
    assert http.get("/nowhere").status_code == 404


async def crowd(server: Server) -> int:
    """How many of more than it takes were told to come back."""
    body = {"prompt": [5, 6, 7], "max_tokens": 32, "ignore_eos": True}
    async with httpx.AsyncClient(base_url=server.url, timeout=120) as http:
        replies = await asyncio.gather(
            *(http.post("/v1/completions", json=body) for _ in range(60))
        )
    return sum(reply.status_code == 429 for reply in replies)


def agent_port(server: Server) -> int:
    """Where the server's own Ray has written which port its agent took."""
    for pid in server.family():
        environ = Path("/proc", str(pid), "environ").read_bytes().decode()
        if found := re.search(rf"\0{RUNTIME_FOLDER}=([^\0]+)\0", environ):
            (file,) = Path(found[1]).glob("session_2*/metrics_export_port_*")
            return int(file.read_text())
    raise AssertionError("the server has no Ray of its own")


def scrape(url: str) -> Scrape:
    labels: dict[str, set[str]] = {}
    values = {}
    for family in text_string_to_metric_families(httpx.get(url, timeout=30).text):
        for sample in family.samples:
            labels.setdefault(sample.name, set()).update(sample.labels)
            values[sample.name, frozenset(sample.labels.items())] = sample.value
    return Scrape(labels, values)


def everything_wanted() -> Wanted:
    expressions = [
        *(each for file in DASHBOARDS.iterdir() for each in _of_dashboard(file)),
        *(
            each
            for rule in load_documents((FOLDER / "monitoring/prometheusrule.yaml").read_text())
            for each in rule_expressions(rule)
        ),
    ]
    return all_wanted(expressions)


def _of_dashboard(file: Path) -> Iterator[str]:
    return dashboard_expressions(json.loads(file.read_text()))


def missing(needs: Wanted, found: Scrape) -> list[str]:
    """Metrics, or labels of metrics, that are asked for and not there."""
    words = []
    for metric, labels in sorted(needs.items()):
        if metric in FROM_PROMETHEUS:
            continue
        if metric not in found.labels:
            words.append(metric)
        else:
            lacking = labels - FROM_DISCOVERY - found.labels[metric]
            words += [f"{metric}{{{label}}}" for label in sorted(lacking)]
    return words


def test_a_scrape_holds_all_that_alerts_and_dashboard_ask_for(agent: tuple[Server, str]) -> None:
    _, url = agent
    needs = everything_wanted()
    assert len(needs) > 30
    wait_until(lambda: not missing(needs, scrape(url)), 60)
    assert missing(needs, scrape(url)) == []


def test_a_name_or_a_label_that_is_misspelt_is_missed(agent: tuple[Server, str]) -> None:
    _, url = agent
    good = "sum by (role) (ray_conclave_actors_alive)"
    wait_until(lambda: not missing(all_wanted([good]), scrape(url)), 60)
    found = scrape(url)
    assert missing(all_wanted([good]), found) == []
    typo = good.replace("actors_alive", "actors_living")
    assert missing(all_wanted([typo]), found) == ["ray_conclave_actors_living"]
    typo = good.replace("role", "rule")
    assert missing(all_wanted([typo]), found) == ["ray_conclave_actors_alive{rule}"]


def test_the_agents_numbers_are_those_of_the_server(agent: tuple[Server, str]) -> None:
    """While nobody asks: every series of /metrics, counters, buckets and all, with its value."""
    server, url = agent
    own = {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(httpx.get(f"{server.url}/metrics").text)
        for sample in family.samples
        # Requests that machines make now and then, this one itself for /metrics among them.
        if sample.name != "conclave_requests_in_progress"
        and sample.labels.get("route") not in QUIET_ROUTES
    }
    names = {name for name, _ in own}
    assert {COUNTED, "conclave_inter_token_latency_seconds_bucket"} <= names

    def differing() -> list[object]:
        values = scrape(url).values
        known: dict[tuple[str, frozenset[tuple[str, str]]], float] = {}
        for (name, labels), value in values.items():
            kept = {key: text for key, text in labels if key in _labels_of(own, name)}
            known[name.removeprefix("ray_"), frozenset(kept.items())] = value
        return [key for key, value in own.items() if known.get(key) != value]

    wait_until(lambda: not differing(), 60)
    assert differing() == []


def _labels_of(own: dict[tuple[str, frozenset[tuple[str, str]]], float], name: str) -> set[str]:
    bare = name.removeprefix("ray_")
    return {key for known, labels in own if known == bare for key, _ in labels}


def test_values_stay_although_nothing_happens(agent: tuple[Server, str]) -> None:
    """A gauge that nobody sets is forgotten by the agent within two of its reports."""
    _, url = agent
    name = f"ray_{COUNTED}"
    wait_until(lambda: name in scrape(url).labels, 60)
    for _ in range(12):
        time.sleep(0.5)
        assert name in scrape(url).labels


def test_prometheus_own_format_is_answered_too(agent: tuple[Server, str]) -> None:
    _, url = agent
    accept = {"Accept": "application/openmetrics-text;version=1.0.0"}
    wait_until(lambda: f"ray_{COUNTED}" in scrape(url).labels, 60)
    text = httpx.get(url, headers=accept, timeout=30).text
    assert f"ray_{COUNTED}{{" in text
