"""Ray's shells around the workers, one class per role so that `ray list actors` reads well."""

from __future__ import annotations

import logging
import threading

import ray

from router.transport.sockets import SocketTransport
from shards.control import Started
from shards.cores import available_cores, spin_seconds
from shards.load_board import reporter
from shards.load_progress import Report
from shards.logs import log_to_stderr
from shards.spare_process import warm_up
from shards.spec import GroupSpec, WorkerSpec
from shards.start_clock import StartClock
from shards.worker import RunsForever, announce, make_worker

log = logging.getLogger("conclave.actors")


class _Shell:
    """`start` loads, `run` is the data loop that never returns: its end is the death watch."""

    def __init__(self, log_level: int, log_format: str) -> None:
        log_to_stderr(log_level, log_format)
        self._worker: RunsForever | None = None

    def node_id(self) -> str:
        """The node this actor was placed on."""
        return str(ray.get_runtime_context().get_node_id())

    def start(self, spec: WorkerSpec, place: str, across_nodes: bool) -> Started:
        """Load the weights and listen, on TCP too when the group spans nodes.

        `place` is the worker's on the board of loading progress.
        """
        clock = StartClock()
        host = ray.util.get_node_ip_address() if across_nodes else None
        transport = SocketTransport(
            spec.peer,
            spec.group.secret,
            tcp_host=host,
            spin_seconds=spin_seconds(spec.group, available_cores()),
        )
        self._worker = make_worker(spec, transport, _reporter(place), clock)
        return announce(self._worker, spec, self.node_id(), clock)

    def run(self) -> None:
        """The data loop."""
        assert self._worker is not None
        self._worker.run()


def _reporter(place: str) -> Report | None:
    try:
        return reporter(place)
    except Exception as error:  # Ray raises many kinds; none of them may stop the loading
        log.warning("%s: progress is not reported: %s", place, error)
        return None


class EngineActor(_Shell):
    """Continuous batching: scheduler, KV blocks, state slots."""


class StageActor(_Shell):
    """A contiguous range of layers."""


class DispatcherActor(_Shell):
    """Routes tokens to expert actors."""


class ExpertActor(_Shell):
    """A set of experts."""


class SpareActor(_Shell):
    """Warm and without weights, until it is told to start as any of the others."""

    def __init__(self, group: GroupSpec, log_level: int, log_format: str) -> None:
        super().__init__(log_level, log_format)
        warm_up(group)

    def is_warm(self) -> bool:
        """Answers once it is, and later to show that it does not hang."""
        return True

    def wait(self) -> None:
        """Never returns: its end is the death watch of a spare that nobody has taken."""
        threading.Event().wait()
