"""Our side of the protocol: engines as child processes, each in its own environment."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
from pathlib import Path
from typing import IO, Any

from benchmarks.peer_environments import python_of

ENGINES = ("conclave", "transformers", "vllm", "llamacpp")
HERE = ("conclave", "transformers")
"""Engines that live in this very environment."""
ROOT = Path(__file__).resolve().parents[2]
TICKS = os.sysconf("SC_CLK_TCK")


class Failed(RuntimeError):
    """What an engine answered instead of a result, or why there was no answer."""


def interpreter(engine: str, environments: Path) -> Path | None:
    """The Python that has this engine; None where it is absent."""
    if engine in HERE:
        return Path(sys.executable)
    python = python_of(environments.absolute(), engine)
    return python if python.exists() else None


def environ_of(threads: int) -> dict[str, str]:
    """A child's environment: `threads` threads, nothing looked up on the network."""
    return {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": str(threads),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "HF_HUB_OFFLINE": "1",
    }


class Worker:
    """One engine's process. `log` takes what it prints."""

    def __init__(self, engine: str, python: Path, threads: int, log: IO[bytes]) -> None:
        self.engine = engine
        self._process = subprocess.Popen(
            [python, "-m", f"benchmarks.peers.{engine}_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env=environ_of(threads),
        )

    def ask(self, operation: str, timeout: float, **arguments: Any) -> dict[str, Any]:
        """One request and its answer. Raises Failed."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        try:
            stdin.write(json.dumps({"operation": operation, **arguments}).encode() + b"\n")
            stdin.flush()
            ready = select.select([stdout], [], [], timeout)[0]
            line = stdout.readline() if ready else b""
        except BrokenPipeError:
            line, ready = b"", [stdout]
        if not line:
            raise Failed("its process died" if ready else f"no answer within {timeout:.0f} s")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise Failed(answer["error"])
        return answer

    def cpu_seconds(self) -> float:
        """CPU time that all its threads have used."""
        stat = Path(f"/proc/{self._process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(stat[11]) + int(stat[12])) / TICKS

    def close(self) -> None:
        """End the process and wait for it."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.close()
            self._process.wait(20)
        except (subprocess.TimeoutExpired, BrokenPipeError):
            self._process.kill()
            self._process.wait()
