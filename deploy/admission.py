"""Who is let in: bounds the sequences under way and their predicted wait. No I/O, no clock."""

from __future__ import annotations

import math
from bisect import insort
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import NoReturn

from deploy.openai_errors import ApiError
from deploy.queue_forecast import Demand, Queue
from deploy.service_rates import ServiceRates
from router.step import EngineLoad

MAX_RETRY_S = 60.0
"""Clients take no longer Retry-After seriously."""
_MIN_RETRY_S = 0.5
_UNKNOWN_RETRY_S = 1.0
_UNKNOWN_ANSWER_S = 0.5
"""What an answer is taken to last before the first one has ended."""
_UNLIMITED = 2**62
_FRESH_S = 0.02
"""An outlook on hundreds of sequences takes a millisecond, and a storm asks a thousand times."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """One sequence before it is admitted; `max_tokens` 0 is computed and not continued."""

    prompt_tokens: int
    max_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class AdmissionLimits:
    """What one replica may have under way. The engine's seats, block size and own queue."""

    num_seats: int
    max_waiting: int
    block_size: int = 1
    max_queue_s: float = 120.0


@dataclass(slots=True, kw_only=True, eq=False)
class Ticket:
    """One admitted sequence; its `work` is a guess until it is settled."""

    work: Work
    arrived: float
    """At the engine, once it is settled."""
    seated: bool
    """Whether it found a free seat, so that its first token's time tells of its prompt alone."""
    first: float | None = None
    emitted: int = 0
    ran_before: float = 0.0
    """Seconds that sequences had run on the replica when its first token came."""


class Admission:
    """Refuses with 429 what would wait too long, and says when there will be room.

    `now` is any clock that only rises. An idle replica admits whatever it can ever serve, and
    until something was observed only the number of sequences counts.
    """

    def __init__(self, limits: AdmissionLimits) -> None:
        self.limits = limits
        self.rates = ServiceRates()
        self.num_admitted = 0
        self.num_refused = 0
        self.num_ended = 0
        self.ended_s = 0.0
        """Seconds that sequences which have ended ran after their first token."""
        self.num_offered = 0
        """Sequences that were admitted or sent away with a 429."""
        self.offered_tokens = 0
        """Those of their prompts."""
        self._live: dict[Ticket, None] = {}
        self._last_prefill = self._promised = -math.inf
        self._seen: _Outlook | None = None
        self._num_running, self._ran_s, self._ran_until = 0, 0.0, 0.0

    @property
    def live(self) -> int:
        """Sequences that are under way."""
        return len(self._live)

    def check(
        self, works: Sequence[Work], now: float, load: EngineLoad, param: str | None = "n"
    ) -> None:
        """Raises ApiError: 429 with the time after which there should be room, 400 if never.

        `param` is the request's field that asks for so many sequences.
        """
        limits = self.limits
        self.check_number(len(works), param)
        if not self._live:
            self._seen = None
            return
        excess = self.live + len(works) - limits.num_seats - limits.max_waiting
        outlook = self._outlook(now, load)
        # One after the other they would not take longer: nothing to predict.
        if excess <= 0 and outlook.total_s <= limits.max_queue_s:
            return
        begins = outlook.queue.turn_of(self._demand(works[0])).begins
        if excess <= 0 and begins <= limits.max_queue_s:
            return
        self._offer(works)
        self._refuse(works, now, begins, max(begins - limits.max_queue_s, outlook.end_of(excess)))

    def check_number(self, num_sequences: int, param: str | None) -> None:
        """Raises ApiError 400 for more sequences in one request than there may ever be."""
        bound = self.limits.num_seats + self.limits.max_waiting
        if num_sequences > bound:
            raise ApiError(
                f"{param}: {num_sequences} sequences in one request, allowed are {bound}",
                param=param,
            )

    def check_room(self, now: float, load: EngineLoad) -> None:
        """Raises ApiError 429 when not even a single sequence would be admitted by number.

        What is sent away unread is taken for an average request.
        """
        if self.live >= self.limits.num_seats + self.limits.max_waiting:
            tokens = round(self.rates.tokens_per_prompt) or 1
            self.check([Work(prompt_tokens=tokens, max_tokens=_UNLIMITED)], now, load)

    def begin(self, works: Sequence[Work], now: float) -> list[Ticket]:
        """Count sequences in; each must be ended."""
        tickets = []
        if self.live < self.limits.num_seats:
            # Whoever was told to come later could have come now: most of them never will.
            self._promised = -math.inf
        for work in works:
            seated = self.live < self.limits.num_seats
            ticket = Ticket(work=work, arrived=now, seated=seated)
            self._live[ticket] = None
            tickets.append(ticket)
            if self._seen is not None:
                self._seen.add(self._demand(work))
        self.num_admitted += len(tickets)
        self._offer(works)
        return tickets

    def settle(
        self, tickets: Sequence[Ticket], works: Sequence[Work], now: float, load: EngineLoad
    ) -> None:
        """What they really ask for is known, and the engine gets them now.

        Raises ApiError 429 where they would wait too long behind those that came before them.
        """
        for ticket, work in zip(tickets, works, strict=True):
            self.offered_tokens += work.prompt_tokens - ticket.work.prompt_tokens
            ticket.work, ticket.arrived = work, now
        if self._outlook(now, load).total_s <= self.limits.max_queue_s:
            return
        queue = Queue(*self._capacity(load))
        for ticket in takewhile(lambda other: other is not tickets[0], self._in_order()):
            queue.add(self._demand(ticket.work, ticket))
        begins = queue.add(self._demand(works[0])).begins
        if begins > self.limits.max_queue_s:
            self._refuse(works, now, begins, begins - self.limits.max_queue_s)

    def first_token(self, ticket: Ticket, now: float) -> None:
        """A sequence's prompt has been computed."""
        ticket.first = now
        self._run(now, +1)
        ticket.ran_before = self._ran_s
        if ticket.seated:
            began = max(ticket.arrived, self._last_prefill)
            self.rates.saw_prefill(ticket.work.prompt_tokens, max(0.0, now - began))
        self._last_prefill = now

    def end(self, ticket: Ticket, now: float) -> None:
        """A sequence is no longer under way, for whatever reason."""
        del self._live[ticket]
        if ticket.first is None:  # it may have been refused, its work no more than a guess
            return
        self.num_ended += 1
        self.rates.saw_prompt(ticket.work.prompt_tokens)
        self._run(now, -1)
        self.ended_s += now - ticket.first
        if ticket.work.max_tokens:
            decode_s = now - ticket.first
            running = (self._ran_s - ticket.ran_before) / decode_s if decode_s > 0 else 1.0
            self.rates.saw_answer(ticket.emitted, decode_s, running)

    @property
    def backlog(self) -> list[Ticket]:
        """Those without a first token, in the order in which they came."""
        return [ticket for ticket in self._live if ticket.first is None]

    def capacity(self, load: EngineLoad) -> float:
        """Sequences such as those of late that can run at once: seats, state slots and blocks."""
        seats, blocks = self._capacity(load)
        rates = self.rates
        tokens = round(rates.tokens_per_prompt + rates.tokens_per_answer)
        return max(1.0, min(seats, blocks / self._blocks(tokens))) if tokens else float(seats)

    def _offer(self, works: Sequence[Work]) -> None:
        self.num_offered += len(works)
        self.offered_tokens += sum(work.prompt_tokens for work in works)

    def _run(self, now: float, change: int) -> None:
        self._ran_s += self._num_running * (now - self._ran_until)
        self._num_running, self._ran_until = self._num_running + change, now

    def _outlook(self, now: float, load: EngineLoad) -> _Outlook:
        """The latest one while it is fresh."""
        key = (load.total_slots, load.total_blocks)
        seen = self._seen
        if seen is None or seen.key != key or not 0 <= now - seen.at <= _FRESH_S:
            demands = (self._demand(ticket.work, ticket) for ticket in self._in_order())
            seen = self._seen = _Outlook(now, key, Queue(*self._capacity(load)), demands)
        return seen

    def _in_order(self) -> list[Ticket]:
        """Those that surely run, then the others as they came."""
        return sorted(self._live, key=lambda ticket: ticket.first is None)

    def _demand(self, work: Work, ticket: Ticket | None = None) -> Demand:
        """What is left to do for it; answers are as long as they have been of late.

        However much it has already said: long answers are rare, but those that are long go on.
        """
        rates = self.rates
        emitted = 0 if ticket is None else ticket.emitted
        to_come = max(0.0, min(work.max_tokens - emitted, rates.tokens_per_answer))
        in_prefill = ticket is None or ticket.first is None
        return Demand(
            prefill_s=work.prompt_tokens * rates.prefill_s_per_token if in_prefill else 0.0,
            decode_s=to_come * rates.decode_s_per_token,
            blocks=self._blocks(work.prompt_tokens + emitted + round(to_come)),
        )

    def _blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self.limits.block_size)

    def _capacity(self, load: EngineLoad) -> tuple[int, int]:
        """Seats and blocks. Shared prefixes make blocks go further than what sequences need."""
        seats = self.limits.num_seats
        if load.total_slots:
            seats = min(seats, load.total_slots)
        if not load.total_blocks:
            return seats, _UNLIMITED
        running = [t for t in self._live if t.first is not None]
        held = sum(self._blocks(t.work.prompt_tokens + t.emitted) for t in running)
        shared = max(0, held - load.used_blocks) if load.running >= len(running) else 0
        return seats, load.total_blocks + shared

    def _refuse(self, works: Sequence[Work], now: float, wait_s: float, room_s: float) -> NoReturn:
        self.num_refused += 1
        raise self._overloaded(wait_s, self._promise(works, now, room_s))

    def _promise(self, works: Sequence[Work], now: float, room_s: float) -> float:
        """Seconds until this request should come again, behind others that were sent away.

        Who is told the same second as all others finds the room taken.
        """
        seats = self.limits.num_seats
        demands = [self._demand(work) for work in works]
        takes = sum(demand.prefill_s + demand.decode_s / seats for demand in demands)
        least = _MIN_RETRY_S
        if not self.rates.tokens_per_prompt:  # nothing has ended yet
            least, takes = _UNKNOWN_RETRY_S, _UNKNOWN_ANSWER_S * len(works) / seats
        latest = now + MAX_RETRY_S
        due = min(latest, max(now + max(least, room_s), self._promised))
        self._promised = min(latest, due + takes)
        return due - now

    def _overloaded(self, wait_s: float, retry_s: float) -> ApiError:
        limits = self.limits
        return ApiError(
            f"The server is overloaded: {self.live} sequences are under way, allowed are "
            f"{limits.num_seats + limits.max_waiting}; another one would wait {wait_s:.0f} s, "
            f"allowed are {limits.max_queue_s:g} s. Try again in {retry_s:.1f} s.",
            status=429,
            kind="rate_limit_error",
            code="rate_limit_exceeded",
            retry_after=retry_s,
        )


class _Outlook:
    """All live sequences played forward, and who was let in since."""

    def __init__(
        self, at: float, key: tuple[int, int], queue: Queue, demands: Iterable[Demand]
    ) -> None:
        self.at = at
        self.key = key
        """What the engine has at all, which tells one engine from its successor."""
        self.queue = queue
        self.total_s = 0.0
        """Of one after the other."""
        self._ends: list[float] = []
        for demand in demands:
            self.add(demand)

    def add(self, demand: Demand) -> None:
        """One more, behind all others."""
        self.total_s += demand.prefill_s + demand.decode_s
        insort(self._ends, self.queue.add(demand).ends)

    def end_of(self, count: int) -> float:
        """Seconds until `count` of them have ended."""
        return self._ends[min(count, len(self._ends)) - 1] if count > 0 and self._ends else 0.0
