"""`serve deploy` of every overlay's Serve configuration, on as many simulated machines as it has.

With CONCLAVE_REHEARSAL, as docs/rehearsal.md tells people to do it by hand.
"""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from deploy.rehearsal import VARIABLE
from k8s.render import FOLDER, overlays
from router.step import SamplingParams
from tests.e2e.conftest import MARK, free_port, marked_processes, wait_until
from tests.groups import ask, running_group
from tests.k8s.rehearsals import (
    environment,
    nano_model,
    planned,
    ray_nodes,
    serve_args,
    serve_config,
)

PROMPT = tuple(range(5, 45))
GREEDY = SamplingParams(max_tokens=16, temperature=0.0, logprobs=0)
START_S = 200
# These two show everything in a minute; the others take more actors or show the same.
ALWAYS = ("nano", "dbrx")
pytestmark = pytest.mark.e2e


@dataclass(frozen=True)
class Simulated:
    """A running cluster: its dashboard's URL, its nodes' ids, the environment of its programs."""

    dashboard: str
    head: str
    workers: tuple[str, ...]
    env: dict[str, str]

    def serve(self, *words: str) -> str:
        """`serve WORDS` as a person would type it; what it prints."""
        command = [str(Path(sys.executable).with_name("serve")), *words, "-a", self.dashboard]
        done = subprocess.run(command, env=self.env, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


@contextmanager
def simulated_cluster(overlay: str) -> Iterator[Simulated]:
    """The overlay's pods as Ray nodes of this machine; afterwards nothing of them is left."""
    mark, port = secrets.token_hex(16), free_port()
    # Short: the paths of Ray's sockets are below it.
    folder = tempfile.mkdtemp(prefix="cv-", dir="/tmp")
    env = {
        **os.environ,
        **environment(overlay),
        VARIABLE: nano_model(overlay),
        MARK: mark,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_TMPDIR": folder,
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0",
        "OMP_NUM_THREADS": "1",
        # The image has the packages there.
        "PYTHONPATH": str(FOLDER.parent),
    }
    env.pop("RAY_ADDRESS", None)
    command = [sys.executable, "-m", "tests.e2e.cluster_program"]
    pipe = subprocess.PIPE
    try:
        with subprocess.Popen(command, env=env, stdin=pipe, stdout=pipe, text=True) as program:
            assert program.stdin is not None
            assert program.stdout is not None
            program.stdin.write(json.dumps({**ray_nodes(overlay), "dashboard_port": port}) + "\n")
            program.stdin.flush()
            found = json.loads(next(line for line in program.stdout if line.startswith("{")))
            try:
                yield Simulated(
                    f"http://127.0.0.1:{port}", found["head"], tuple(found["workers"]), env
                )
            finally:
                program.stdin.close()
                program.wait(timeout=60)
        assert program.returncode == 0
        assert wait_until(lambda: not marked_processes(mark), 30), "processes were left behind"
    finally:
        for pid in marked_processes(mark):
            os.kill(pid, 9)
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def deployed(overlay: str, cluster: Simulated, folder: Path) -> Iterator[httpx.Client]:
    """The overlay's application, once it answers; then Serve is shut down and its actors gone."""
    config = serve_config(overlay)
    port = free_port()
    config["http_options"] |= {"host": "127.0.0.1", "port": port}
    file = folder / "serve.yaml"
    file.write_text(yaml.safe_dump(config))
    cluster.serve("deploy", str(file))
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
        assert wait_until(lambda: _is_ready(client), START_S), cluster.serve("status")
        status = yaml.safe_load(cluster.serve("status"))["applications"]
        assert {name: each["status"] for name, each in status.items()} == {
            config["applications"][0]["name"]: "RUNNING"
        }
        yield client
        pids = {actor["pid"] for actor in _actors(client)}
    cluster.serve("shutdown", "-y")
    assert wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids), 60)


def _is_ready(client: httpx.Client) -> bool:
    try:
        return client.get("/ready").status_code == 200
    except httpx.TransportError:
        return False


def _actors(client: httpx.Client) -> list[dict[str, Any]]:
    actors: list[dict[str, Any]] = client.get("/v1/experts").json()["actors"]
    return actors


@pytest.mark.parametrize(
    "overlay",
    [
        pytest.param(each.name, marks=() if each.name in ALWAYS else pytest.mark.slow)
        for each in overlays()
    ],
)
def test_an_overlay_serves_where_its_plan_says(overlay: str, tmp_path: Path) -> None:
    with simulated_cluster(overlay) as cluster, deployed(overlay, cluster, tmp_path) as client:
        actors = _actors(client)
        name = serve_args(overlay).get("served_model_name", "nano-jamba")
        body = {"model": name, "prompt": list(PROMPT), "temperature": 0, "max_tokens": 16}
        asked = {"logprobs": 0, "ignore_eos": True, "return_token_ids": True}
        reply = client.post(
            "/v1/completions", json={**body, **asked}, headers={"x-request-id": "x" * 200}
        )
    _check_places(overlay, cluster, actors)
    _check_answer(overlay, reply)
    # The manifests' environment has Serve's proxies refuse such ids.
    assert reply.headers.get_list("x-request-id") != ["x" * 200]


def _check_places(overlay: str, cluster: Simulated, actors: list[dict[str, Any]]) -> None:
    """Every actor of the plan on the plan's machine, whichever of the workers that is."""
    places = planned(overlay)
    places.pop("ingress-0")
    found = {f"{actor['role']}-{actor['index']}": actor for actor in actors}
    assert found.keys() == places.keys()
    machines = {places[name].node: actor["node_id"] for name, actor in found.items()}
    assert sorted(machines.values()) == sorted(cluster.workers)
    for name, place in places.items():
        assert found[name]["node_id"] == machines[place.node], name
        assert tuple(found[name]["experts"]) == place.experts, name


def _check_answer(overlay: str, reply: httpx.Response) -> None:
    """Token for token what one process computes."""
    assert reply.status_code == 200, reply.text
    (choice,) = reply.json()["choices"]
    quantization = serve_args(overlay).get("quantization", "none")
    with running_group(nano_model(overlay), executor="local", quantization=quantization) as group:
        expected = asyncio.run(ask(group, PROMPT, GREEDY))
    assert tuple(choice["token_ids"]) == expected.token_ids
    assert tuple(choice["logprobs"]["token_logprobs"]) == expected.logprobs
