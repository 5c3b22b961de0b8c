"""One request, four ways in: `conclave serve`, `serve run`, curl, the openai client, the handle."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.conftest import free_port, serving, wait_until
from tests.e2e.handle_program import BODY, MODEL, OPTIONS

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.e2e


def test_handle_http_curl_and_openai_client_agree() -> None:
    # A program of its own: Ray reads its authentication settings once per process.
    command = [sys.executable, "-m", "tests.e2e.handle_program"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("all ways agree\n")


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


def test_too_little_memory_exits_with_1_and_the_reason() -> None:
    command = [sys.executable, "-m", "deploy.cli", "serve", "nano-jamba", "--log-level", "error"]
    command += ["--port", str(free_port()), "--max-num-seqs", "30000000"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert done.stdout == ""
    reason = "conclave: cannot serve: kv_cache_memory=auto: node "
    last = done.stderr.splitlines()[-1]
    assert last.startswith(reason)
    assert "max_num_seqs=30000000 need" in last


def test_requests_are_named_counted_and_logged(tmp_path: Path) -> None:
    flags = ["--log-format", "json", "--log-level", "info", "--sse-keep-alive-seconds", "0.001"]
    body = {"prompt": [5, 6, 7], "max_tokens": 400, "ignore_eos": True, "stream": True}
    with serving(tmp_path / "server.log", "nano-phimoe", *flags) as server:
        with httpx.Client(base_url=server.url, timeout=60) as client:
            _ids_are_echoed(client)
            with client.stream(
                "POST", "/v1/completions", json=body, headers={"x-request-id": "gone"}
            ) as reply:
                assert reply.headers.get_list("x-request-id") == ["gone"]
                lines = reply.iter_lines()
                assert next(lines) == ": keep-alive"
                assert any(line.startswith("data: ") for line in lines)
            assert wait_until(lambda: not _running(client), 20)
            text = client.get("/metrics").text
        shown = server.log.read_text()
        records = _access_records(shown)
    # What Serve says of itself is its own; `ready on` is for whoever starts the server.
    assert not [line for line in shown.splitlines() if line.startswith("conclave")]
    started = [json.loads(line)["message"] for line in shown.splitlines() if "conclave.cli" in line]
    assert [message.split(":")[0] for message in started][:1] == ["kernels"]
    left = 'route="/v1/completions",status="499"} 1.0'
    assert left in text
    assert len(set(re.findall(r'replica_id="([^"]+)"', text))) == 1
    assert records["gone"]["client_gone"]
    assert 0 < records["gone"]["completion_tokens"] < 400
    assert (records["mine"]["route"], records["mine"]["status"]) == ("other", 404)


def _ids_are_echoed(client: httpx.Client) -> None:
    """Once on every response; the client's own where it is sane."""
    for path, status in (("/v1/models", 200), ("/v1/models/x", 404), ("/nowhere", 404)):
        reply = client.get(path, headers={"x-request-id": "mine"})
        assert (reply.status_code, reply.headers.get_list("x-request-id")) == (status, ["mine"])
        assert len(client.get(path).headers.get_list("x-request-id")) == 1
        reply = client.get(path, headers={"x-request-id": "x" * 129})
        [own] = reply.headers.get_list("x-request-id")
        assert len(own) < 129


def _running(client: httpx.Client) -> int:
    return int(client.get("/v1/experts").json()["load"]["running"])


def _access_records(log: str) -> dict[str, dict[str, Any]]:
    """By request id; every line of ours is JSON."""
    lines = [json.loads(line) for line in log.splitlines() if line.startswith("{")]
    return {r["request_id"]: r for r in lines if r["logger"] == "conclave.access"}
