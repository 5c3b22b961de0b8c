"""Steps that are lost although every worker is alive: when to try again, and when to stop."""

from __future__ import annotations

from collections import deque

from shards.member import respawn_pause_s

MAX_LOST_STEPS = 8
LOST_STEPS_WINDOW_S = 60.0


class LostSteps:
    """I/O-free. Times are those of one clock, in seconds."""

    def __init__(self) -> None:
        self.due: float | None = None
        """When to connect everyone again; None where no step was lost."""
        self._times: deque[float] = deque()

    def add(self, now: float) -> bool:
        """A step was lost; True when many were, and nothing has explained them or gone well since.

        The first two are tried again at once, the next ones after ever longer pauses.
        """
        self._times.append(now)
        while now - self._times[0] > LOST_STEPS_WINDOW_S:
            self._times.popleft()
        self.due = now + respawn_pause_s(len(self._times))
        return len(self._times) > MAX_LOST_STEPS

    def clear(self) -> None:
        """A death explains them, or tokens have come; what is due stays so."""
        self._times.clear()

    def take(self, now: float) -> bool:
        """Whether it is time; the caller connects everyone then."""
        if self.due is None or now < self.due:
            return False
        self.due = None
        return True
