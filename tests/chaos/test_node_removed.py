"""A whole node is taken away under load: nobody notices."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

OPTIONS = {
    "--model": "nano-dbrx",
    "--cluster": "ray",
    "--nodes": "3",
    "--parts": "nodes",
    "--calm": "2",
    "--requests": "60",
    "--distinct": "24",
    "--rate": "4",
    "--expert-shards": "2",
}


@pytest.mark.e2e
@pytest.mark.slow
def test_nobody_notices_that_a_node_is_gone(tmp_path: Path) -> None:
    report = tmp_path / "chaos.json"
    words = [word for option in OPTIONS.items() for word in option]
    # A program of its own: Ray reads its authentication settings once per process.
    command = [sys.executable, "-m", "benchmarks.chaos", *words, "--json", str(report)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr[-4000:]
    (run,) = json.loads(report.read_text())["runs"]
    assert run["verdicts"] == {"right": 60, "failed": 0, "truncated": 0, "changed": 0}
    (row,) = run["rows"]
    assert row["label"] == "remove node"
    assert row["unhealed"] == 0
    assert row["count"] == 1
