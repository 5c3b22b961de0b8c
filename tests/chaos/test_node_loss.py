"""Nodes are taken away, with room for their workers elsewhere and without."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys

import pytest

PROGRAM = "tests.chaos.node_loss_program"


@pytest.mark.e2e
def test_workers_move_or_requests_are_told_when_to_come_back() -> None:
    env = {
        **os.environ,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_worker_niceness": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "OMP_NUM_THREADS": "1",
    }
    env.pop("RAY_ADDRESS", None)
    ended = subprocess.run(
        [sys.executable, "-m", PROGRAM], env=env, capture_output=True, text=True, timeout=240
    )
    assert ended.returncode == 0, ended.stderr[-4000:]
    seen = json.loads(ended.stdout.splitlines()[-1])
    assert seen["in_the_middle"], "the streams must still be open when the node goes"
    assert seen["unchanged"]
    assert seen["moved"]
    # Then there is no room for them anywhere.
    assert seen["waited_s"] >= 20
    assert seen["retry_after_s"] > 0
    assert seen["refused_at_once"]
    assert seen["state"] == "recovering"
    assert seen["trouble"] in ("stage-0", "expert-0")
    # A new node joins.
    assert seen["healed"]
    assert seen["answers_again"]
