"""Ray's shells around the workers, one class per role so that `ray list actors` reads well."""

from __future__ import annotations

import logging

import ray

from router.transport.sockets import SocketTransport
from shards.control import Started
from shards.load_board import reporter
from shards.load_progress import Report
from shards.logs import log_to_stderr
from shards.spec import WorkerSpec
from shards.worker import RunsForever, announce, make_worker

log = logging.getLogger("conclave.actors")


class _Shell:
    """`start` loads, `run` is the data loop that never returns: its end is the death watch."""

    def __init__(self, spec: WorkerSpec, log_level: int) -> None:
        log_to_stderr(log_level)
        self._spec = spec
        self._worker: RunsForever | None = None

    def node_id(self) -> str:
        """The node this actor was placed on."""
        return str(ray.get_runtime_context().get_node_id())

    def start(self, across_nodes: bool) -> Started:
        """Load the weights and listen, on TCP too when the group spans nodes."""
        host = ray.util.get_node_ip_address() if across_nodes else None
        transport = SocketTransport(self._spec.peer, self._spec.group.secret, tcp_host=host)
        self._worker = make_worker(self._spec, transport, self._reporter())
        return announce(self._worker, self._spec, self.node_id())

    def _reporter(self) -> Report | None:
        name = ray.get_runtime_context().get_actor_name()
        try:
            return reporter(name, self._spec)
        except Exception as error:  # Ray raises many kinds; none of them may stop the loading
            log.warning("%s: progress is not reported: %s", name, error)
            return None

    def run(self) -> None:
        """The data loop."""
        assert self._worker is not None
        self._worker.run()


class EngineActor(_Shell):
    """Continuous batching: scheduler, KV blocks, state slots."""


class StageActor(_Shell):
    """A contiguous range of layers."""


class DispatcherActor(_Shell):
    """Routes tokens to expert actors."""


class ExpertActor(_Shell):
    """A set of experts."""
