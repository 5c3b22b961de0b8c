"""Which expert actor holds which experts: pure functions and frozen tables."""

from __future__ import annotations

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

    Shards hold equally many experts, give or take one; copies of one expert land on different
    shards. Raises ValueError when a copy would share a shard with another copy or a shard stays
    empty.
    """
    num_copies = num_experts * num_replicas
    if num_experts < 1:
        raise ValueError(f"num_experts={num_experts}: allowed 1 or more")
    if not 1 <= num_replicas <= num_shards:
        raise ValueError(
            f"expert_replicas={num_replicas}: allowed 1..{num_shards} with "
            f"expert_shards={num_shards} (copies of an expert must not share a shard)"
        )
    if not 1 <= num_shards <= num_copies:
        raise ValueError(
            f"expert_shards={num_shards}: allowed 1..{num_copies} "
            f"for {num_experts} experts with {num_replicas} replicas"
        )
    # All copies in one line, replica after replica, cut into even runs: each shard reads one
    # contiguous range of experts. Copies of an expert are num_experts apart, and no run is
    # longer than that because num_replicas <= num_shards. So they lie num_shards / num_replicas
    # shards apart: neighbours often share a node, and a node may die as a whole.
    return Placement(
        num_shards=num_shards,
        shards=tuple(
            tuple(
                (replica * num_experts + expert) * num_shards // num_copies
                for replica in range(num_replicas)
            )
            for expert in range(num_experts)
        ),
    )
