"""What Ray sets aside for the replicas of a model, before any of them is placed."""

from __future__ import annotations

from deploy.bundles import cpus_of_bundles
from deploy.resolve import ResolvedArgs


def bundle_cpus(resolved: ResolvedArgs) -> list[float]:
    """CPUs of each bundle of a replica's placement group."""
    return cpus_of_bundles(resolved.spec, resolved.cpus_per_actor)


def num_cpus(resolved: ResolvedArgs) -> float:
    """CPUs that all replicas reserve at most."""
    return resolved.max_replicas * sum(bundle_cpus(resolved))
