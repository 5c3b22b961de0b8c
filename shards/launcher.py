"""How a group starts and ends its workers: the seam between it and Ray, or plain subprocesses."""

from __future__ import annotations

from typing import Protocol

from shards.control import Started
from shards.spec import WorkerSpec


class WorkerEvents(Protocol):
    """Where a launcher reports; both may be called from any thread."""

    def started(self, spec: WorkerSpec, started: Started) -> None:
        """The worker listens."""

    def died(self, spec: WorkerSpec, reason: str, fatal: bool) -> None:
        """The worker's process ended; `fatal` when starting it again cannot help."""


class Launcher(Protocol):
    """Starts worker processes: Ray actors, or subprocesses in tests."""

    def spawn(self, spec: WorkerSpec, events: WorkerEvents) -> None:
        """Start a worker without waiting for it."""

    def discard(self, spec: WorkerSpec) -> None:
        """Kill this incarnation if it still runs."""

    def close(self) -> None:
        """Kill what is left of the workers and wait for it."""
