"""What a served model returns beside text is Transformers', over the handle and over HTTP."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.e2e
def test_forward_and_classify_are_transformers(tmp_path: Path) -> None:
    # A program of its own: Ray reads its authentication settings once per process.
    command = [sys.executable, "-m", "tests.e2e.outputs_program", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("all outputs agree\n")
