"""Admission with a clock and the engine's load: what requests pass through."""

from __future__ import annotations

import time
from collections.abc import Sequence

from deploy.admission import Admission, Ticket, Work
from shards.client import ModelClient


class Place:
    """The sequences of one admitted request, from before it is tokenized. Who has it, leaves it."""

    def __init__(self, client: ModelClient, admission: Admission, tickets: list[Ticket]) -> None:
        self._client = client
        self._admission = admission
        self._tickets = tickets

    def settle(self, works: Sequence[Work]) -> None:
        """What it really asks for. Raises ApiError 429 where that takes too long."""
        now = time.monotonic()
        self._admission.settle(self._tickets, works, now, self._client.load)

    def saw_token(self, index: int) -> None:
        """Sequence `index` of the request has one more token, or is computed."""
        ticket = self._tickets[index]
        ticket.emitted += 1
        if ticket.first is None:
            self._admission.first_token(ticket, time.monotonic())

    def leave(self) -> None:
        """Nothing of it is under way any more; harmless when it has left."""
        now = time.monotonic()
        while self._tickets:
            self._admission.end(self._tickets.pop(), now)


class Gate:
    """One per replica, for all routes and handles."""

    def __init__(self, client: ModelClient, admission: Admission) -> None:
        self._client = client
        self.admission = admission

    def take(self, works: Sequence[Work], param: str = "n") -> Place:
        """A place for so many sequences, which counts from now on.

        Raises ApiError 429, or 400 where the request's `param` asks for too many.
        """
        now = time.monotonic()
        self.admission.check(works, now, self._client.load, param)
        return Place(self._client, self.admission, self.admission.begin(works, now))

    def check_room(self) -> None:
        """Raises ApiError 429 where nothing at all would be admitted."""
        self.admission.check_room(time.monotonic(), self._client.load)
