"""When broken connections to expert workers are made again: a policy without I/O."""

from __future__ import annotations

RELINK_S = 0.05
"""After a broken connection; who is at its end has mostly died, and that is known by then."""
MAX_RELINK_S = 3.2
"""Waits double up to here while connections keep breaking."""
RELINKS_WINDOW_S = 10.0
"""After so long without a broken connection the first wait is the shortest again."""


class Relinks:
    """Breaks in, the time of the next table out. Times are those of one clock, in seconds."""

    def __init__(self) -> None:
        self.due: float | None = None
        """When to have all broken connections made again; None where none is broken."""
        self._wait_s = RELINK_S
        self._last = float("-inf")

    def on_broken(self, now: float) -> None:
        """A connection broke, or could not be made; others that broke before share its turn."""
        if self.due is not None:
            return
        again = now - self._last < RELINKS_WINDOW_S
        self._wait_s = min(2 * self._wait_s, MAX_RELINK_S) if again else RELINK_S
        self.due = now + self._wait_s

    def take(self, now: float) -> bool:
        """Whether it is time; the caller makes the connections then."""
        if self.due is None or now < self.due:
            return False
        self.due, self._last = None, now
        return True
