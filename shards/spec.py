"""What one model instance is made of: frozen descriptions that travel to every worker."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from router.engine import EngineLimits
from router.placement import Placement


class Role(StrEnum):
    """The four kinds of worker behind an ingress."""

    ENGINE = "engine"
    STAGE = "stage"
    DISPATCHER = "dispatcher"
    EXPERT = "expert"


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupSpec:
    """One model instance as the user asked for it, every default already resolved.

    `stage_layers[i]` is the half-open range of layers of stage i. `dispatch` is actor or direct;
    `executor` is local or pipeline. `secret` keeps strangers off the group's sockets.
    """

    model_path: str
    dtype: str
    executor: str
    dispatch: str
    stage_layers: tuple[tuple[int, int], ...]
    placement: Placement | None
    """Which expert worker holds which experts; None without expert workers."""
    limits: EngineLimits
    threads: int
    secret: str
    quantization: str = "none"
    """none, int8 or int8-all, whether quantised at load or in the files."""
    unused_token_ids: tuple[tuple[int, int], ...] = ()
    """Half-open ranges of vocabulary rows that no token owns: never sampled."""

    @property
    def num_expert_shards(self) -> int:
        """How many expert workers there are."""
        return 0 if self.placement is None else self.placement.num_shards


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSpec:
    """One worker of a group. `incarnation` counts respawns of the same role and index."""

    group: GroupSpec
    role: Role
    index: int
    incarnation: int = 0

    @property
    def peer(self) -> str:
        """The worker's name on the transport."""
        return f"{self.role}-{self.index}"
