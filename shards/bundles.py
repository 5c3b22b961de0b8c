"""Which bundle of a replica's placement group each actor is in: pure functions."""

from __future__ import annotations

from shards.spec import GroupSpec, Role, WorkerSpec


def bundle_index(worker: WorkerSpec) -> int:
    """Bundle 0 holds ingress, engine and dispatcher; then one per stage, one per expert actor.

    An instance that is spread over so many nodes has one bundle per node instead.
    """
    group = worker.group
    if group.num_nodes is not None:
        return node_of(group, worker.role, worker.index, group.num_nodes)
    match worker.role:
        case Role.STAGE:
            return 1 + worker.index
        case Role.EXPERT:
            return 1 + len(group.stage_layers) + worker.index
        case _:
            return 0


def node_of(group: GroupSpec, role: str, index: int, num_nodes: int) -> int:
    """Stages in their order evenly over the nodes, expert shards likewise; the rest on node 0.

    So every node has its share of the layers and its share of the experts, which are most of the
    memory; and copies of an expert, which lie far apart, are on different nodes where shards divide
    evenly.
    """
    match role:
        case Role.STAGE:
            return index * num_nodes // len(group.stage_layers)
        case Role.EXPERT:
            return index * num_nodes // group.num_expert_shards
        case _:
            return 0


def most_nodes(group: GroupSpec) -> int:
    """More would leave one of them without an actor that computes."""
    if group.executor == "local":
        return 1
    return max(len(group.stage_layers), group.num_expert_shards)
