"""What a replica reserves of Ray, in bundles: one per actor, or one per node."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from deploy.config import ConfigError
from shards.bundles import bundle_index, most_nodes
from shards.spec import GroupSpec, worker_specs


def spread_over(spec: GroupSpec, nodes: int | None) -> GroupSpec:
    """The same instance on so many nodes; None leaves that to Ray. Raises ConfigError."""
    most = most_nodes(spec)
    if nodes is not None and nodes > most:
        raise ConfigError(
            f"nodes={nodes}: allowed values are 1..{most}, as many as there are stages or expert "
            "shards"
        )
    return replace(spec, num_nodes=nodes)


def cpus_of_bundles(spec: GroupSpec, cpus_per_actor: float) -> list[float]:
    """CPUs of each bundle of a replica's placement group, in its order: so many per actor."""
    actors = Counter(bundle_index(worker) for worker in worker_specs(spec))
    actors[0] += 1  # the ingress
    return [round(actors[index] * cpus_per_actor, 4) for index in range(len(actors))]
