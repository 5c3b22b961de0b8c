"""How long a worker may take from its start until it has loaded: a policy without I/O."""

from __future__ import annotations

from shards.spec import WorkerSpec


class LoadBound:
    """Starts and ends in, who takes too long out. Times are those of one clock, in seconds."""

    def __init__(self, load_s: float) -> None:
        self._load_s = load_s
        self._starting: dict[WorkerSpec, float] = {}

    @property
    def due(self) -> float | None:
        """When somebody will have taken too long; None while nobody is starting."""
        return min(self._starting.values()) + self._load_s if self._starting else None

    def begin(self, spec: WorkerSpec, now: float) -> None:
        """It is being started."""
        self._starting[spec] = now

    def end(self, spec: WorkerSpec) -> None:
        """It has loaded, or died."""
        self._starting.pop(spec, None)

    def overdue(self, now: float) -> list[WorkerSpec]:
        """Who has taken too long; each once."""
        late = [spec for spec, began in self._starting.items() if now - began >= self._load_s]
        for spec in late:
            del self._starting[spec]
        return late
