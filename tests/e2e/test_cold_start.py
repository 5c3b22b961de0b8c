"""A start seen from outside: its profile, what its workers import, settings without a restart."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from tests.e2e.conftest import serving
from tests.module_list import modules_of, telling_environment

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.e2e
OPTIONS = ("--stages", "2", "--expert-shards", "2", "--no-warm-spare")
# What Ray itself imports in a worker (starlette, with token authentication) is not ours to say.
NEVER_OURS = """
    deploy fastapi uvicorn jinja2 openai typer prometheus_client transformers tokenizers
    tiktoken sentencepiece ray.serve
"""


def test_the_profile_of_a_start_and_the_imports_of_its_workers(
    log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, file = tmp_path / "asked", tmp_path / "profile.json"
    asked.mkdir()
    for name, value in telling_environment(asked).items():
        monkeypatch.setenv(name, value)
    flags = [*OPTIONS, "--profile-startup", "--profile-startup-json", str(file)]
    with serving(log, "nano-jamba", *flags) as server:
        _check_profile(log.read_text(), json.loads(file.read_text()))
        metrics = httpx.get(f"{server.url}/metrics", timeout=20).text
        _check_nothing_was_counted(metrics)
        actors = httpx.get(f"{server.url}/v1/experts", timeout=20).json()["actors"]
        imported = {actor["role"]: modules_of(actor["pid"], asked) for actor in actors}
    assert imported.keys() == {"engine", "stage", "dispatcher", "expert"}
    for role, modules in imported.items():
        assert "shards.worker" in modules
        assert (role, modules & set(NEVER_OURS.split())) == (role, set())
    assert "torch" not in imported["engine"]
    assert "torch" in imported["stage"]


def _check_profile(printed: str, profile: dict[str, object]) -> None:
    parts = {(part["name"], part["where"]): part["seconds"] for part in profile["parts"]}  # type: ignore[attr-defined]
    assert all(seconds >= 0 for seconds in parts.values())
    for name, where in (
        ("imports", "command"),
        ("Ray", "command"),
        ("placement", "replica"),
        ("first token", "instance"),
    ):
        assert parts[name, where] > 0
        assert f"  {name:<12} {where:<12}" in printed
    replica = profile["replica"]
    workers = {w["worker"]: w for w in replica["group"]["workers"]}  # type: ignore[index]
    names = {"engine-0", "stage-0", "stage-1", "dispatcher-0", "expert-0", "expert-1"}
    assert workers.keys() == names
    for name in ("stage-0", "stage-1", "expert-0", "expert-1"):
        assert workers[name]["num_bytes"] > 0
        assert workers[name]["times"]["read_s"] > 0
    assert printed.index("start-up ") < printed.index("ready on http://")


def _check_nothing_was_counted(metrics: str) -> None:
    """The token that proved it is no client's."""
    values = [line.rsplit(" ", 1) for line in metrics.splitlines() if not line.startswith("#")]
    names = (
        "conclave_prefix_tokens_total",
        "conclave_generation_tokens_total",
        "conclave_prompt_tokens_total",
        "conclave_expert_tokens_total",
        "conclave_time_to_first_token_seconds_count",
        "conclave_kv_cache_blocks_used",
        "conclave_state_snapshots_used",
    )
    assert sum(float(value) for name, value in values if name.startswith(names)) == 0


def test_settings_change_without_a_restart() -> None:
    # A program of its own: Ray reads its authentication settings once per process.
    command = [sys.executable, "-m", "tests.e2e.user_config_program"]
    env = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, cwd=ROOT, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("changed without a restart\n")
