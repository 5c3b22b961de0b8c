"""Workers as plain subprocesses: fast tests, and machines without Ray."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Mapping
from os import environ

from router.codec import decode, encode
from shards.control import Started
from shards.group import WorkerEvents
from shards.spec import WorkerSpec

FATAL_EXIT = 3
"""Exit code of a worker that could not start for a reason that will not go away."""


class SubprocessLauncher:
    """Runs `python -m shards.worker_main` per worker; its spec goes in on standard input."""

    def __init__(self, env: Mapping[str, str] | None = None) -> None:
        self._env = {**environ, **(env or {})}
        self._processes: dict[WorkerSpec, subprocess.Popen[bytes]] = {}
        self._watchers: list[threading.Thread] = []
        self._closing = False

    def spawn(self, spec: WorkerSpec, events: WorkerEvents) -> None:
        """Start a worker; a thread waits for its start line and for its end."""
        if self._closing:
            return
        process = subprocess.Popen(
            [sys.executable, "-m", "shards.worker_main"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=self._env,
        )
        self._processes[spec] = process
        watcher = threading.Thread(target=self._watch, args=(process, spec, events), daemon=True)
        self._watchers.append(watcher)
        watcher.start()

    def _watch(
        self, process: subprocess.Popen[bytes], spec: WorkerSpec, events: WorkerEvents
    ) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        data = encode(spec)
        try:
            process.stdin.write(len(data).to_bytes(4, "little") + data)
            process.stdin.flush()
            answer = process.stdout.read()
        except BrokenPipeError:
            answer = b""
        if answer:
            events.started(spec, decode(Started, answer))
        code = process.wait()
        process.stdin.close()
        process.stdout.close()
        events.died(spec, f"exit code {code}", code == FATAL_EXIT)

    def discard(self, spec: WorkerSpec) -> None:
        """SIGKILL one incarnation."""
        if spec in self._processes:
            self._processes[spec].kill()

    def close(self) -> None:
        """End what is left and wait for it."""
        self._closing = True
        for process in self._processes.values():
            try:
                process.wait(timeout=5)
            except subprocess.TimeoutExpired:
                process.kill()
        for watcher in self._watchers:
            watcher.join()
