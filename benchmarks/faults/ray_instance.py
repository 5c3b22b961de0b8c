"""An instance on a Ray cluster of simulated nodes, all on this machine, which may be removed."""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from benchmarks.faults.instances import START_TIMEOUT_S, Instance, Options, group_spec
from benchmarks.faults.launcher import ChaosLauncher
from benchmarks.faults.wire import Wire
from router.transport.sockets import SocketTransport
from shards.control import INGRESS
from shards.group import ModelGroup
from shards.spec import GroupSpec

_CPUS = 0.1
_NODE: dict[str, Any] = {
    "num_cpus": 4,
    "object_store_memory": 80 << 20,
}


class ClusterNodes:
    """The cluster's nodes; the head, where the ingress is, stays."""

    def __init__(self, cluster: Any, group: Any) -> None:
        self._cluster = cluster
        self._group = group

    def remove_busiest(self) -> str:
        """Take away the node that most of the instance is on, without warning; its id."""
        from ray.util.placement_group import placement_group_table

        bundles = placement_group_table(self._group)["bundles_to_node_id"]
        busy = Counter(bundles.values())
        node = max(self._cluster.worker_nodes, key=lambda node: busy[node.node_id])
        node_id = str(node.node_id)
        self._cluster.remove_node(node, allow_graceful=False)
        return node_id


@contextmanager
def ray_instance(
    options: Options, nodes: int, wire: Wire | None = None
) -> Iterator[tuple[Instance, ClusterNodes]]:
    """Workers as actors, spread over `nodes` nodes; the first holds ingress and engine."""
    spec = group_spec(options)
    with _cluster(nodes) as cluster:
        import ray

        from shards.ray_launcher import RayLauncher

        ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
        try:
            placed = _placement_group(spec, spread=nodes > 1)
            launcher = ChaosLauncher(RayLauncher("chaos", placed, _CPUS), wire)
            host = ray.util.get_node_ip_address() if nodes > 1 else None
            transport = SocketTransport(INGRESS, spec.secret, tcp_host=host)
            group = ModelGroup(spec, launcher, transport)
            group.start(timeout=START_TIMEOUT_S)
            try:
                yield Instance(group, launcher), ClusterNodes(cluster, placed)
            finally:
                group.stop()
        finally:
            ray.shutdown()


@contextmanager
def _cluster(nodes: int) -> Iterator[Any]:
    # Short: Ray's socket paths below it must fit into 107 characters.
    folder = tempfile.mkdtemp(prefix="ch-", dir="/tmp")
    environment = dict(os.environ)
    os.environ.update(
        RAY_AUTH_MODE="token",
        RAY_AUTH_TOKEN=secrets.token_hex(32),
        RAY_worker_niceness="0",
        RAY_USAGE_STATS_ENABLED="0",
        OMP_NUM_THREADS="1",
    )
    # Only now: Ray reads its authentication settings when it is imported.
    from ray.cluster_utils import Cluster

    cluster = Cluster()
    try:
        cluster.add_node(**_NODE, temp_dir=folder, include_dashboard=False)
        for _ in range(nodes - 1):
            cluster.add_node(**_NODE)
        yield cluster
    finally:
        cluster.shutdown()
        os.environ.clear()
        os.environ.update(environment)
        shutil.rmtree(folder, ignore_errors=True)


def _placement_group(spec: GroupSpec, *, spread: bool) -> Any:
    import ray
    from ray.util.placement_group import placement_group

    others = len(spec.stage_layers) + spec.num_expert_shards
    # The replica's own place: the node that is never removed.
    first = {"CPU": 3 * _CPUS, "node:__internal_head__": 0.001}
    bundles = [first, *({"CPU": _CPUS} for _ in range(others))]
    placed = placement_group(bundles, strategy="SPREAD" if spread else "PACK")
    ray.get(placed.ready(), timeout=60)
    return placed
