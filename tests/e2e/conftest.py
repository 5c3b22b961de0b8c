"""A real `conclave serve` process, and what a person or a machine would check around it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

START_TIMEOUT_S = 240
MARK = "CONCLAVE_TEST_MARK"


@dataclass(frozen=True)
class Server:
    """One running server: its URL, its process, and the mark all its descendants inherit."""

    url: str
    process: subprocess.Popen[str]
    mark: str
    log: Path

    def family(self) -> set[int]:
        """Every living process that this server, or anything it started, has started."""
        return marked_processes(self.mark)


def marked_processes(mark: str) -> set[int]:
    """Processes whose environment holds the mark."""
    found = set()
    for entry in os.listdir("/proc"):
        try:
            environ = Path("/proc", entry, "environ").read_bytes() if entry.isdigit() else b""
        except OSError:
            continue
        if f"{MARK}={mark}".encode() in environ:
            found.add(int(entry))
    return found


def free_port() -> int:
    """A TCP port that was free a moment ago."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@contextmanager
def serving(
    log: Path, *arguments: str, command: tuple[str, ...] = (), port: int = 0
) -> Iterator[Server]:
    """`conclave serve ARGUMENTS`, or another `command` that serves on `port`, once it is ready."""
    port, mark = port or free_port(), uuid.uuid4().hex
    line = ""
    if not command:
        command = (sys.executable, "-m", "deploy.cli", "serve")
        arguments = (*arguments, "--port", str(port))
        line = f"ready on http://127.0.0.1:{port}\n"
    env = {**os.environ, MARK: mark}
    env.pop("RAY_ADDRESS", None)
    with log.open("w") as sink:
        process = subprocess.Popen(
            [*command, *arguments], stdout=sink, stderr=subprocess.STDOUT, text=True, env=env
        )
    server = Server(f"http://127.0.0.1:{port}", process, mark, log)
    try:
        deadline = time.monotonic() + START_TIMEOUT_S
        while line not in log.read_text() or not _is_ready(server.url):
            assert process.poll() is None, log.read_text()[-4000:]
            assert time.monotonic() < deadline, log.read_text()[-4000:]
            time.sleep(0.2)
        yield server
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(timeout=60)
            except subprocess.TimeoutExpired:
                process.kill()
        gone = wait_until(lambda: not server.family(), 30)
        for pid in server.family():
            os.kill(pid, signal.SIGKILL)
        assert gone, "processes of the server outlived it"


def _is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/ready", timeout=5).status_code == 200
    except httpx.TransportError:
        return False


def wait_until(condition: Callable[[], bool], timeout: float) -> bool:
    """Poll until `condition` holds; False after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.1)
    return False


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "server.log"
