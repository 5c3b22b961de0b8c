"""Who dials whom."""

from __future__ import annotations

from shards.spec import Role, WorkerSpec


def dialled_by(spec: WorkerSpec) -> list[str]:
    """The peers that a worker dials; expert workers are dialled from the routing table instead."""
    group = spec.group
    if spec.role is Role.ENGINE and group.executor == "pipeline":
        return [f"{Role.STAGE}-0"]
    if spec.role is not Role.STAGE:
        return []
    is_last = spec.index == len(group.stage_layers) - 1
    peers = [f"{Role.ENGINE}-0" if is_last else f"{Role.STAGE}-{spec.index + 1}"]
    if group.num_expert_shards:
        peers.append(f"{Role.DISPATCHER}-0")
    return peers
