"""Which expert actor holds which experts: pure functions and frozen tables."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """`shards[logical]` lists the expert actors that hold a copy, the preferred one first."""

    num_shards: int
    shards: tuple[tuple[int, ...], ...]

    def held_by(self, shard: int) -> tuple[int, ...]:
        """Logical experts with a physical copy on `shard`, ascending."""
        return tuple(e for e, holders in enumerate(self.shards) if shard in holders)


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardAddress:
    """Where one incarnation of an expert actor listens."""

    shard: int
    incarnation: int
    address: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingTable:
    """A published, versioned placement: only shards in `addresses` may be called."""

    version: int
    placement: Placement
    addresses: tuple[ShardAddress, ...]


def place_experts(num_experts: int, num_shards: int, num_replicas: int) -> Placement:
    """Spread `num_experts` logical experts with `num_replicas` copies each over `num_shards`.

    Copies of one expert land on different shards. Counts need not divide evenly.
    Raises ValueError when a copy would share a shard with another copy or a shard stays empty.
    """
    if not 1 <= num_shards <= num_experts * num_replicas:
        raise ValueError(
            f"expert_shards={num_shards}: allowed 1..{num_experts * num_replicas} "
            f"for {num_experts} experts with {num_replicas} replicas"
        )
    if not 1 <= num_replicas <= num_shards:
        raise ValueError(
            f"expert_replicas={num_replicas}: allowed 1..{num_shards} with "
            f"expert_shards={num_shards} (copies of an expert must not share a shard)"
        )
    holders = tuple(tuple(_copies(e, num_experts, num_shards, num_replicas)) for e in range(num_experts))
    return Placement(num_shards=num_shards, shards=holders)


def _copies(expert: int, num_experts: int, num_shards: int, num_replicas: int) -> Iterator[int]:
    # Contiguous runs first (cheap range reads of stacked experts); replica r is shifted by r
    # shards, so that the loss of one shard spreads its load.
    home = expert * num_shards // num_experts if num_shards <= num_experts else expert
    for replica in range(num_replicas):
        yield (home + replica * max(1, num_shards // num_replicas)) % num_shards
