"""What Ray sets aside for the replicas of a model, before any of them is placed."""

from __future__ import annotations

from deploy.resolve import ResolvedArgs


def bundle_cpus(resolved: ResolvedArgs) -> list[float]:
    """CPUs of each bundle of a replica's placement group.

    Bundle 0 holds ingress, engine and dispatcher; every other actor has its own.
    """
    spec, each = resolved.spec, resolved.cpus_per_actor
    if spec.executor == "local":
        return [round(2 * each, 4)]
    in_first = 3 if spec.num_expert_shards else 2
    others = len(spec.stage_layers) + spec.num_expert_shards
    return [round(in_first * each, 4)] + [each] * others


def num_cpus(resolved: ResolvedArgs) -> float:
    """CPUs that all replicas reserve at most."""
    return resolved.max_replicas * sum(bundle_cpus(resolved))
