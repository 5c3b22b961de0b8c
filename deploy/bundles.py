"""What a replica reserves of Ray: one bundle per process that computes, and one for the rest."""

from __future__ import annotations

from shards.spec import GroupSpec


def cpus_of_bundles(spec: GroupSpec, cpus_per_actor: float) -> list[float]:
    """CPUs of each bundle of a replica's placement group, in its order.

    Bundle 0 holds ingress, engine and dispatcher; every other actor has its own.
    """
    each = cpus_per_actor
    if spec.executor == "local":
        return [round(2 * each, 4)]
    in_first = 3 if spec.num_expert_shards else 2
    others = len(spec.stage_layers) + spec.num_expert_shards
    return [round(in_first * each, 4)] + [each] * others
