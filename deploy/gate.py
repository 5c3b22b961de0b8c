"""Admission with a clock and the engine's load: what requests pass through."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from deploy.admission import Admission, Ticket, Work
from shards.client import ModelClient


class Held:
    """The sequences of one request while they are under way."""

    def __init__(self, admission: Admission, tickets: Sequence[Ticket]) -> None:
        self._admission = admission
        self._tickets = tickets

    def saw_token(self, index: int) -> None:
        """Sequence `index` of the request has one more token, or is computed."""
        ticket = self._tickets[index]
        ticket.emitted += 1
        if ticket.first is None:
            self._admission.first_token(ticket, time.monotonic())


class Gate:
    """One per replica, for all routes and handles."""

    def __init__(self, client: ModelClient, admission: Admission) -> None:
        self._client = client
        self.admission = admission

    def check(self, works: Sequence[Work], param: str = "n") -> None:
        """Raises ApiError 429, or 400 where the request's `param` asks for too many sequences."""
        self.admission.check(works, time.monotonic(), self._client.load, param)

    def check_room(self) -> None:
        """Raises ApiError 429 where nothing at all would be admitted."""
        self.admission.check_room(time.monotonic(), self._client.load)

    @contextmanager
    def hold(self, works: Sequence[Work]) -> Iterator[Held]:
        """Count sequences for as long as they run."""
        tickets = self.admission.begin(works, time.monotonic())
        try:
            yield Held(self.admission, tickets)
        finally:
            now = time.monotonic()
            for ticket in tickets:
                self.admission.end(ticket, now)
