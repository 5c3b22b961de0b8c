"""Workers as plain subprocesses: fast tests, and machines without Ray."""

from __future__ import annotations

import logging
import select
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from os import environ
from typing import IO

from router.codec import CodecError, decode, encode
from shards.control import Started
from shards.launcher import WorkerEvents
from shards.spares import Spares
from shards.spec import GroupSpec, WorkerSpec

log = logging.getLogger("conclave.launcher")

FATAL_EXIT = 3
"""Exit code of a worker that could not start for a reason that will not go away."""
ALIVE = b"+"
"""What a spare says when it is warm, and again when a spec comes."""
_ALIVE_MS = 1000
"""A spare that takes longer to say so hangs: an ordinary process takes its place."""
_HERE = "here"
"""The one node there is."""

_Process = subprocess.Popen[bytes]


class SubprocessLauncher:
    """Runs `python -m shards.worker_main` per worker; its spec goes in on standard input."""

    def __init__(self, env: Mapping[str, str] | None = None) -> None:
        self._env = {**environ, **(env or {})}
        self._processes: dict[WorkerSpec, _Process] = {}
        self._spares: Spares[_Process] = Spares()
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()
        self._closing = False

    def spawn(self, spec: WorkerSpec, events: WorkerEvents) -> None:
        """Start a worker; a thread waits for its start line and for its end."""
        with self._lock:
            if self._closing:
                return
            self._spares.on_spawn(spec)
            spare = self._spares.take(_HERE)
            try:
                process = self._processes[spec] = spare or self._start()
            except OSError as error:
                self._spares.on_died(spec)
                self._begin(events.died, spec, f"cannot be started: {error}", False)
                return
            self._begin(self._watch, process, spec, events, spare is not None)

    def _start(self, *arguments: str) -> _Process:
        # Unbuffered: what a dead process has not read is nobody's to flush.
        return subprocess.Popen(
            [sys.executable, "-m", "shards.worker_main", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=self._env,
            bufsize=0,
        )

    def _begin(self, target: Callable[..., None], *arguments: object) -> None:
        thread = threading.Thread(target=target, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _watch(
        self, process: _Process, spec: WorkerSpec, events: WorkerEvents, is_spare: bool
    ) -> None:
        told = _tell(process, spec, answer=is_spare)
        if is_spare and not told:
            try:
                successor = self._replace(process, spec)
            except OSError as error:
                self._on_died(spec, events, f"cannot be started: {error}")
            else:
                self._watch(successor, spec, events, False)
            return
        answer = _pipe(process.stdout).read() if told else b""
        if answer:
            try:
                events.started(spec, decode(Started, answer))
                self._on_answered(spec)
            except CodecError as error:
                log.warning("%s does not say how it was started: %s", spec.peer, error)
                process.kill()
        code = _end(process)
        self._on_died(spec, events, f"exit code {code}", code == FATAL_EXIT)

    def _on_died(
        self, spec: WorkerSpec, events: WorkerEvents, reason: str, fatal: bool = False
    ) -> None:
        with self._lock:
            self._processes.pop(spec, None)
            self._spares.on_died(spec)
        events.died(spec, reason, fatal)

    def _replace(self, spare: _Process, spec: WorkerSpec) -> _Process:
        """An ordinary process in the place of a spare that gives no answer."""
        log.warning("a spare does not answer: %s is started without one", spec.peer)
        spare.kill()
        _end(spare)
        with self._lock:
            process = self._start()
            if self._closing or spec not in self._processes:
                process.kill()  # nobody wants it any more
            else:
                self._processes[spec] = process
        return process

    def _on_answered(self, spec: WorkerSpec) -> None:
        with self._lock:
            self._spares.on_answered(spec)
        self._make_spare(spec.group)

    def _make_spare(self, group: GroupSpec) -> None:
        with self._lock:
            if group.warm_spare and self._spares.wanted([_HERE]):
                try:
                    spare = self._start("--spare")
                except OSError as error:
                    log.warning("a spare cannot be started: %s", error)
                    self._spares.give_up(_HERE)
                    return
                self._spares.put(_HERE, spare)
                self._begin(self._watch_spare, spare, group)

    def _watch_spare(self, spare: _Process, group: GroupSpec) -> None:
        """Wait until it is warm, then until it has ended or somebody has taken it."""
        stdout = _pipe(spare.stdout)
        if _tell(spare, group) and stdout.read(1) == ALIVE:
            with self._lock:
                self._spares.on_warm(spare)
            _wait_readable(stdout)
        with self._lock:
            ended = self._spares.on_ended(spare, time.monotonic())
        if ended:
            spare.kill()  # one that says what no spare says has not ended yet
            code = _end(spare)
            if not self._closing:
                log.warning("a spare has ended: exit code %d", code)
            self._make_spare(group)

    def discard(self, spec: WorkerSpec) -> None:
        """SIGKILL one incarnation."""
        with self._lock:
            process = self._processes.pop(spec, None)
        if process is not None:
            process.kill()

    def close(self) -> None:
        """End what is left and wait for it."""
        with self._lock:
            self._closing = True
            processes = list(self._processes.values())
            for spare in self._spares.close():
                spare.kill()
        for process in processes:
            try:
                process.wait(timeout=5)
            except subprocess.TimeoutExpired:
                process.kill()
        for thread in self._threads:
            thread.join()


def _tell(process: _Process, message: WorkerSpec | GroupSpec, *, answer: bool = False) -> bool:
    """Write a message; False where the process has ended, or gives no `answer` to its length."""
    data, stdin, stdout = encode(message), _pipe(process.stdin), _pipe(process.stdout)
    try:
        stdin.write(len(data).to_bytes(4, "little"))
        if answer and not (_wait_readable(stdout, _ALIVE_MS) and stdout.read(1)):
            return False
        rest = memoryview(data)
        while rest:  # a bare pipe may take less than a vocabulary at once
            rest = rest[stdin.write(rest) :]
    except BrokenPipeError:
        return False
    return True


def _wait_readable(stream: IO[bytes], timeout_ms: int | None = None) -> bool:
    """Wait until there is something to read, if only its end."""
    poll = select.poll()
    poll.register(stream, select.POLLIN)
    return bool(poll.poll(timeout_ms))


def _pipe(stream: IO[bytes] | None) -> IO[bytes]:
    assert stream is not None, "every process has both"
    return stream


def _end(process: _Process) -> int:
    """Wait for a process and let go of it; returns its exit code."""
    code = process.wait()
    _pipe(process.stdin).close()
    _pipe(process.stdout).close()
    return code
