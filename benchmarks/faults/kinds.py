"""Faults and the order in which they come: pure."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

SIGNALS = ("kill", "stop")
"""SIGKILL, SIGSTOP."""
WIRE = ("reset", "cut", "delay", "throttle")
"""A connection reset, one reset in the middle of a chunk, one made late, one made slow."""
SLOWNESS = ("delay", "throttle")
NODE = "remove"
"""A whole machine is taken away."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault: of a process (`role`, `index`), or of its link with a `dialer`, a role too."""

    kind: str
    role: str
    index: int
    dialer: str = ""

    @property
    def label(self) -> str:
        """Under which the accounts are kept: its kind and the roles it touches."""
        of = f"{self.dialer} to {self.role}" if self.dialer else self.role
        return f"{self.kind} {of}"

    def __str__(self) -> str:
        return f"{self.label}-{self.index}"


Worker = tuple[str, int]
"""Role and index."""
Link = tuple[str, str]
"""Who dialled, and who was dialled, by their transport names."""


def rotation(kinds: Sequence[str], workers: Sequence[Worker], seed: int) -> Iterator[Fault]:
    """Signals for ever: every round each role once per kind, in a new order, its workers in turn.

    A short run meets every kind of actor; a long one every actor.
    """
    rng = random.Random(seed)
    by_role: dict[str, list[int]] = {}
    for role, index in workers:
        by_role.setdefault(role, []).append(index)
    turn = 0
    while True:
        faults = [
            Fault(kind, role, indices[turn % len(indices)])
            for kind in kinds
            for role, indices in by_role.items()
        ]
        rng.shuffle(faults)
        yield from faults
        turn += 1


def node_losses(num_nodes: int) -> Iterator[Fault]:
    """One node after the other, until the ingress's and one more are left."""
    return iter([Fault(NODE, "node", turn) for turn in range(num_nodes - 2)])


def wire_rotation(kinds: Sequence[str], links: Sequence[Link], seed: int) -> Iterator[Fault]:
    """The same for links: every round each pair of roles once per kind."""
    rng = random.Random(seed)
    by_roles: dict[Link, list[Link]] = {}
    for dialer, target in sorted(links):
        roles = (dialer.rsplit("-", 1)[0], target.rsplit("-", 1)[0])
        by_roles.setdefault(roles, []).append((dialer, target))
    turn = 0
    while True:
        faults = []
        for kind in kinds:
            for (dialer, role), pairs in by_roles.items():
                target = pairs[turn % len(pairs)][1]
                faults.append(Fault(kind, role, int(target.rsplit("-", 1)[1]), dialer))
        rng.shuffle(faults)
        yield from faults
        turn += 1
