"""How long requests wait for a group that heals."""

from __future__ import annotations

from shards.client import GroupState, GroupUnavailable, Trouble

RETRY_AFTER_S = 10.0
"""When to ask again of a group that heals for nobody knows how long."""


class Patience:
    """States and times in; says when waiting is over. It begins anew once the group is ready."""

    def __init__(self, recovery_s: float) -> None:
        self._recovery_s = recovery_s
        self.since: float | None = None
        """When the group began to heal; None while it has no need to."""
        self.over = False
        """Nobody waits any more, until the group is ready."""

    @property
    def due(self) -> float | None:
        """When it will be over."""
        return None if self.since is None or self.over else self.since + self._recovery_s

    def look(self, state: GroupState, now: float) -> bool:
        """Take note of the state; True at the one moment when waiting is over."""
        if state is not GroupState.RECOVERING:
            self.since, self.over = None, False
            return False
        if self.since is None:
            self.since = now
        if self.over or now - self.since < self._recovery_s:
            return False
        self.over = True
        return True

    def refusal(self, trouble: Trouble | None) -> GroupUnavailable | None:
        """What is answered once waiting is over; `trouble` may say when to come back."""
        if not self.over:
            return None
        respawn_in_s = 0.0 if trouble is None else trouble.respawn_in_s
        message = f"The model instance has been recovering for more than {self._recovery_s:g} s."
        return GroupUnavailable(message, respawn_in_s or RETRY_AFTER_S)
