"""What one model instance is made of: frozen descriptions that travel to every worker."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from router.engine import EngineLimits
from router.placement import Placement
from shards.vocabulary import Vocabulary


class Role(StrEnum):
    """The four kinds of worker behind an ingress."""

    ENGINE = "engine"
    STAGE = "stage"
    DISPATCHER = "dispatcher"
    EXPERT = "expert"


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheCost:
    """What some layers remember, in bytes: of one KV block, and of one recurrent state."""

    block_bytes: int
    state_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Deadlines:
    """How long, in seconds, something may take before it is given up."""

    hang_s: float = 1.0
    """Silence of a worker that is not at work."""
    step_s: float = 300.0
    """One turn of a worker's data loop."""
    load_s: float = 1800.0
    """From the start of a worker until it has loaded."""
    recovery_s: float = 120.0
    """Waiting of requests while the group heals."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WarmUp:
    """One sequence that passes through everything before the first client's does.

    `max_tokens` is 1, or 0 where the model has no head to make one.
    """

    token_id: int
    max_tokens: int


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
    """What the engine may use; with `cache_costs` the most that its caches may be."""
    threads: int
    """Compute threads of each worker."""
    secret: str
    quantization: str = "none"
    """none, int8 or int8-all, whether quantised at load or in the files."""
    kernels: str = "auto"
    """torch, or the native variant that every worker must have and what of it is off
    (`amx,-attention`); auto: each for itself."""
    crowded: bool = False
    """More threads than cores on some node: they sleep while they wait."""
    unused_token_ids: tuple[tuple[int, int], ...] = ()
    """Half-open ranges of vocabulary rows that no token owns: never sampled."""
    vocabulary: Vocabulary | None = None
    """For answers that keep to a grammar; None without a tokenizer."""
    deadlines: Deadlines = Deadlines()
    cache_costs: tuple[CacheCost, ...] = ()
    """Of each entry of `stage_layers` where free memory decides how large caches are; else none."""
    num_nodes: int | None = None
    """It has one placement bundle for each of so many nodes; None: one per actor, anywhere."""
    warm_spare: bool = False
    """Every node keeps one process ready to become any worker that must be started again."""

    warm_up: WarmUp | None = None
    """What the group computes in an epoch of its own before it is ready."""

    @property
    def first_epoch(self) -> int:
        """The first one whose work is a client's, and counts."""
        return 1 if self.warm_up is None else 2

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


def worker_specs(spec: GroupSpec) -> tuple[WorkerSpec, ...]:
    """Every worker of a group: just the engine for the local executor."""
    roles = [(Role.ENGINE, 1)]
    if spec.executor == "pipeline":
        roles += [(Role.STAGE, len(spec.stage_layers)), (Role.EXPERT, spec.num_expert_shards)]
        if spec.num_expert_shards:
            roles.append((Role.DISPATCHER, 1))
    return tuple(
        WorkerSpec(group=spec, role=role, index=index)
        for role, count in roles
        for index in range(count)
    )
