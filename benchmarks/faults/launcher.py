"""A launcher between a group and its workers: what it announces, and whom it starts again."""

from __future__ import annotations

import threading
from dataclasses import asdict, replace
from typing import Any

from benchmarks.faults.wire import Wire
from shards.control import Started
from shards.launcher import Launcher, WorkerEvents
from shards.spec import WorkerSpec


class ChaosLauncher:
    """Delegates to `inner`; with a `wire` every worker is reached through the proxy.

    Remembers every address and process id, for the search for what is left behind.
    """

    def __init__(self, inner: Launcher, wire: Wire | None = None) -> None:
        self._inner = inner
        self._wire = wire
        self._lock = threading.Lock()
        self._barred: set[str] = set()
        self._waiting: list[tuple[WorkerSpec, WorkerEvents]] = []
        self.addresses: set[str] = set()
        self.pids: set[int] = set()

    def __getattr__(self, name: str) -> Any:
        # Whatever else a group asks of its launcher is none of our business.
        return getattr(self._inner, name)

    def spawn(self, spec: WorkerSpec, events: WorkerEvents) -> None:
        """Start a worker, unless it is barred."""
        with self._lock:
            if spec.peer in self._barred:
                self._waiting.append((spec, events))
                return
        self._inner.spawn(spec, _Announcer(self, events))

    def bar(self, peer: str) -> None:
        """From now on this worker is not started again."""
        with self._lock:
            self._barred.add(peer)

    def admit(self, peer: str) -> None:
        """Start it, if it was to be started meanwhile."""
        with self._lock:
            self._barred.discard(peer)
            ready = [entry for entry in self._waiting if entry[0].peer == peer]
            self._waiting = [entry for entry in self._waiting if entry[0].peer != peer]
        for spec, events in ready:
            self.spawn(spec, events)

    def announced(self, spec: WorkerSpec, started: Started) -> Started:
        """What the group is told of a worker that listens."""
        self.pids.add(started.pid)
        for value in asdict(started).values():
            # Every socket that a worker names, whatever it is for.
            if isinstance(value, str) and value.startswith(("unix:", "tcp:")):
                self.addresses.update(value.split(","))
        if self._wire is None:
            return started
        address = self._wire.front(spec.peer, started.address)
        self.addresses.add(address)
        return replace(started, address=address)

    def discard(self, spec: WorkerSpec) -> None:
        """Kill one incarnation."""
        self._inner.discard(spec)

    def close(self) -> None:
        """Kill what is left and wait for it."""
        self._inner.close()


class _Announcer:
    """The group's ears, with other addresses."""

    def __init__(self, launcher: ChaosLauncher, events: WorkerEvents) -> None:
        self._launcher = launcher
        self._events = events

    def __getattr__(self, name: str) -> Any:
        return getattr(self._events, name)

    def started(self, spec: WorkerSpec, started: Started) -> None:
        """The worker listens."""
        self._events.started(spec, self._launcher.announced(spec, started))

    def died(self, spec: WorkerSpec, reason: str, fatal: bool) -> None:
        """The worker's process ended."""
        self._events.died(spec, reason, fatal)
