"""What one replica's start took, measured inside it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from shards.start_record import GroupStart


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaStart:
    """In seconds that follow each other."""

    replica_id: str = ""
    imports_s: float = 0.0
    """Processor time of its process until it began: Python's, Ray's and our imports."""
    kernels_s: float = 0.0
    tokenizer_s: float = 0.0
    """Tokenizer, chat template and the vocabulary's bytes."""
    group: GroupStart = field(default_factory=GroupStart)
    rest_s: float = 0.0
    """What none of the others explains, the end of the constructor included."""

    @property
    def inside_s(self) -> float:
        """All but the imports."""
        group = self.group
        group_s = group.load_s + group.connect_s + group.first_token_s
        return self.kernels_s + self.tokenizer_s + group_s + self.rest_s


class ReplicaClock:
    """Runs from its making."""

    def __init__(self) -> None:
        self._imports_s = time.process_time()
        self._began = time.monotonic()
        self._parts: dict[str, float] = {}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Take the time of a block; several of one name add up."""
        began = time.monotonic()
        yield
        self._parts[name] = self._parts.get(name, 0.0) + time.monotonic() - began

    def start(self, replica_id: str, group: GroupStart) -> ReplicaStart:
        """It is ready now."""
        known = ReplicaStart(
            replica_id=replica_id,
            imports_s=self._imports_s,
            kernels_s=self._parts.get("kernels", 0.0),
            tokenizer_s=self._parts.get("tokenizer", 0.0),
            group=group,
        )
        rest_s = max(0.0, time.monotonic() - self._began - known.inside_s)
        return replace(known, rest_s=rest_s)
