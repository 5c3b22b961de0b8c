"""Ray's shells around the workers, one class per role so that `ray list actors` reads well."""

from __future__ import annotations

import os

import ray

from router.transport.sockets import SocketTransport
from shards.control import Started
from shards.spec import WorkerSpec
from shards.worker import RunsForever, make_worker


class _Shell:
    """`start` loads, `run` is the data loop that never returns: its end is the death watch."""

    def __init__(self, spec: WorkerSpec) -> None:
        self._spec = spec
        self._worker: RunsForever | None = None

    def node_id(self) -> str:
        """The node this actor was placed on."""
        return str(ray.get_runtime_context().get_node_id())

    def start(self, across_nodes: bool) -> Started:
        """Load the weights and listen, on TCP too when the group spans nodes."""
        host = ray.util.get_node_ip_address() if across_nodes else None
        transport = SocketTransport(self._spec.peer, self._spec.group.secret, tcp_host=host)
        self._worker = make_worker(self._spec, transport)
        return Started(
            address=transport.address,
            pid=os.getpid(),
            node_id=self.node_id(),
            bytes_read=self._worker.bytes_read,
        )

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
