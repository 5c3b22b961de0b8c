"""The end may come in the middle of a recovery: streams are finished, nothing stays behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import httpx
import pytest

from benchmarks.faults.leftovers import Belongings
from tests.e2e.conftest import Server, serving, wait_until

pytestmark = pytest.mark.e2e

FLAGS = ("nano-dbrx", "--stages", "2", "--expert-shards", "2", "--dtype", "float32")
BODY = {
    "prompt": [5, 6, 7, 8],
    "max_tokens": 150,
    "temperature": 0,
    "ignore_eos": True,
    "stream": True,
}


def _stream(server: Server, lines: list[str], first: threading.Event) -> None:
    with httpx.stream("POST", f"{server.url}/v1/completions", json=BODY, timeout=90) as reply:
        for line in filter(None, reply.iter_lines()):
            # Everything but the request's own id and time of creation.
            lines.append(line.split('"choices"', 1)[-1])
            if len(lines) > 5:
                first.set()


def _pid(server: Server, role: str, index: int) -> int:
    actors = httpx.get(f"{server.url}/v1/experts").json()["actors"]
    return next(int(a["pid"]) for a in actors if (a["role"], a["index"]) == (role, index))


@pytest.mark.parametrize("signal_number", [signal.SIGKILL, signal.SIGSTOP])
def test_sigterm_in_the_middle_of_a_recovery(tmp_path: Path, signal_number: int) -> None:
    expected: list[str] = []
    lines: list[str] = []
    belongings = Belongings()
    with serving(tmp_path / "server.log", *FLAGS) as server:
        _stream(server, expected, threading.Event())
        victim, first = _pid(server, "stage", 1), threading.Event()
        reader = threading.Thread(target=_stream, args=(server, lines, first))
        reader.start()
        assert first.wait(30)
        belongings.look()
        os.kill(victim, signal_number)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(timeout=90) == 0
        reader.join(timeout=30)
    assert lines == expected
    assert lines[-1] == "data: [DONE]"
    assert wait_until(lambda: not belongings.left([]), 20), belongings.left([])


def test_deletion_in_the_middle_of_a_recovery() -> None:
    belongings = Belongings()
    program = [sys.executable, "-m", "tests.chaos.delete_program"]
    env = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    ended = subprocess.run(program, capture_output=True, text=True, timeout=200, env=env)
    assert ended.returncode == 0, ended.stdout + ended.stderr[-4000:]
    assert "nothing is left" in ended.stdout
    assert wait_until(lambda: not belongings.left([]), 20), belongings.left([])
