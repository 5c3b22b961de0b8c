"""Who is let in, and when those that are not should come again: played in simulated seconds."""

from __future__ import annotations

import heapq
import random
from dataclasses import dataclass, field
from typing import Any

import pytest

from deploy.admission import MAX_RETRY_S, Admission, AdmissionLimits, Ticket, Work
from deploy.openai_errors import ApiError
from router.step import EngineLoad

SEATS = 2
PREFILL_S = 0.01
TOKEN_S = 0.1
IDLE = EngineLoad()


def admission(max_queue_s: float = 10.0, max_waiting: int = 1000, seats: int = SEATS) -> Admission:
    limits = AdmissionLimits(
        num_seats=seats, max_waiting=max_waiting, block_size=4, max_queue_s=max_queue_s
    )
    return Admission(limits)


def work(prompt_tokens: int = 10, max_tokens: int = 1000) -> Work:
    return Work(prompt_tokens=prompt_tokens, max_tokens=max_tokens)


def taught(policy: Admission, prompt: int = 10, answer: int = 20) -> Admission:
    """Has seen sequences alone on the replica: their speed and the length of their answers."""
    now = -1000.0
    for _ in range(20):
        [ticket] = policy.begin([work(prompt)], now)
        now += prompt * PREFILL_S
        policy.first_token(ticket, now)
        ticket.emitted = answer
        now += (answer - 1) * TOKEN_S
        policy.end(ticket, now)
    return policy


def asked(
    policy: Admission, works: list[Work], now: float, load: EngineLoad = IDLE
) -> float | None:
    """None where they may come in, or the seconds after which they should come again."""
    try:
        policy.check_room(now, load)
        policy.check(works, now, load)
    except ApiError as error:
        refused = error
    else:
        return None
    assert refused.status == 429
    assert refused.retry_after is not None
    assert 0 < refused.retry_after <= MAX_RETRY_S
    return refused.retry_after


def retry(policy: Admission, works: list[Work], now: float, load: EngineLoad = IDLE) -> float:
    seconds = asked(policy, works, now, load)
    assert seconds is not None
    return seconds


def test_rates_are_those_that_were_shown() -> None:
    rates = taught(admission()).rates
    assert rates.prefill_s_per_token == pytest.approx(PREFILL_S)
    assert rates.decode_s_per_token == pytest.approx(TOKEN_S)
    assert rates.tokens_per_answer == pytest.approx(20)


def test_rates_follow_a_change() -> None:
    policy = taught(taught(admission()), answer=40)
    assert 35 < policy.rates.tokens_per_answer < 40


def test_prompts_of_one_step_share_its_time() -> None:
    policy = admission(seats=8)
    tickets = policy.begin([work(10)] * 4, 5.0)
    for ticket in tickets:
        policy.first_token(ticket, 7.0)
    assert policy.rates.prefill_s_per_token == pytest.approx(2.0 / 40, rel=0.3)


def test_waiting_for_a_seat_is_not_prefill() -> None:
    policy = taught(admission(seats=1))
    first, second = policy.begin([work(), work()], 0.0)
    policy.first_token(first, 0.1)
    policy.end(first, 50.0)
    policy.first_token(second, 50.1)
    assert policy.rates.prefill_s_per_token == pytest.approx(PREFILL_S)


def test_only_the_number_counts_before_anything_was_seen() -> None:
    policy = admission(max_queue_s=0.001, max_waiting=3)
    for _ in range(SEATS + 3):
        policy.check([work(10**9)], 0.0, IDLE)
        policy.begin([work(10**9)], 0.0)
    assert retry(policy, [work()], 0.0) == 1.0
    assert policy.live == policy.num_admitted == SEATS + 3
    assert policy.num_refused == 1


def test_more_than_there_is_room_for_at_all_is_a_bad_request() -> None:
    policy = admission(max_waiting=3)
    policy.check([work()] * (SEATS + 3), 0.0, IDLE)
    with pytest.raises(ApiError) as never:
        policy.check([work()] * (SEATS + 4), 0.0, IDLE, "prompt")
    assert (never.value.status, never.value.param) == (400, "prompt")


def test_an_idle_replica_admits_whatever_comes() -> None:
    policy = taught(admission(max_queue_s=0.1))
    policy.check([work(10**6, 10**6)] * 500, 0.0, IDLE)


def test_the_predicted_wait_is_bounded() -> None:
    policy = taught(admission(max_queue_s=10.0))
    # Each holds one of two seats for 0.1 + 2 s: a pair each 2.1 s, and a bit for the prompts.
    admitted = 0
    while admitted < 100 and asked(policy, [work()], 0.0) is None:
        policy.begin([work()], 0.0)
        admitted += 1
    assert 9 <= admitted <= 12
    assert 0.5 <= retry(policy, [work()], 0.0) <= 2.5


def test_long_prompts_count_before_they_are_computed() -> None:
    policy = taught(admission(max_queue_s=10.0, seats=50))
    policy.begin([work(prompt_tokens=600)], 0.0)  # 6 s
    policy.check([work()], 0.0, IDLE)
    [second] = policy.begin([work(prompt_tokens=600)], 0.0)
    assert retry(policy, [work()], 0.0) == pytest.approx(2.0, abs=0.2)
    policy.end(second, 1.0)
    policy.check([work()], 1.0, IDLE)


def test_kv_blocks_count() -> None:
    policy = taught(admission(max_queue_s=10.0, seats=50))
    full = EngineLoad(running=0, total_blocks=100)
    tickets = policy.begin([work(prompt_tokens=380)] * 6, 0.0)
    for ticket in tickets:
        policy.first_token(ticket, 0.0)
        ticket.emitted = 1
    # 100 blocks of 4 tokens: one sequence of 380 + 20 tokens at a time, each of 2 s.
    policy.check([work()], 0.0, EngineLoad(total_blocks=10**6))
    assert retry(policy, [work(prompt_tokens=380)], 0.0, full) > 0
    shared = EngineLoad(running=6, used_blocks=100, total_blocks=100)
    policy.check([work(prompt_tokens=380)], 1.0, shared)


def test_state_slots_count() -> None:
    policy = taught(admission(max_queue_s=1.0, seats=50))
    policy.begin([work()] * 2, 0.0)
    policy.check([work()], 0.0, IDLE)
    retry(policy, [work()], 0.0, EngineLoad(total_slots=1))


def test_retry_times_are_spread_and_bounded() -> None:
    policy = taught(admission(max_queue_s=1.0))
    policy.begin([work()] * 4, 0.0)
    times = [retry(policy, [work()], 0.0) for _ in range(100)]
    assert times == sorted(times)
    assert times[20] - times[0] == pytest.approx(20 * (0.1 + 2 / SEATS), rel=0.05)
    assert times[-1] == MAX_RETRY_S
    # What was promised is over after a while.
    later = retry(policy, [work()], 500.0)
    assert later < 5


def test_the_impatient_make_nobody_wait_once_there_is_room() -> None:
    policy = taught(admission(max_waiting=2))
    tickets = policy.begin([work()] * 4, 0.0)
    for number in range(1000):  # of clients that come again at once
        last = retry(policy, [work()], number / 1000)
    assert last == pytest.approx(MAX_RETRY_S, abs=0.01)
    for ticket in tickets:
        policy.end(ticket, 5.0)
    for _ in range(4):
        policy.check([work()], 6.0, IDLE)
        policy.begin([work()], 6.0)
    assert retry(policy, [work()], 6.0) < 5


@pytest.mark.parametrize("seed", range(50))
def test_an_outlook_is_kept_up_to_date(seed: int) -> None:
    """What was forecast a moment ago, and who came since, say the same as a new forecast."""
    rng = random.Random(seed)
    limits: dict[str, Any] = {
        "max_queue_s": rng.choice([1.0, 8.0]),
        "max_waiting": rng.choice([3, 30]),
        "seats": rng.randint(1, 5),
    }
    load = EngineLoad(total_blocks=rng.choice([0, 40, 10**6]))
    kept, fresh = taught(admission(**limits)), taught(admission(**limits))
    for step in range(60):
        works = [work(rng.choice([5, 50, 500]))] * rng.choice([1, 1, 2])
        now = step * 1e-5
        fresh._seen = None
        answers = [asked(policy, works, now, load) for policy in (kept, fresh)]
        assert answers[0] == pytest.approx(answers[1])
        if answers[0] is None:
            for policy in (kept, fresh):
                policy.begin(works, now)
    assert kept.live == fresh.live >= 1


def test_who_is_settled_waits_for_those_before_it_only() -> None:
    policy = taught(admission(max_queue_s=10.0, seats=50))
    first = policy.begin([work(10)], 0.0)
    policy.begin([work(600)], 0.0)
    last = policy.begin([work(10)], 0.0)
    policy.settle(first, [work(900)], 1.0, IDLE)
    assert (first[0].work.prompt_tokens, first[0].arrived) == (900, 1.0)
    with pytest.raises(ApiError) as refused:
        policy.settle(last, [work(20)], 1.0, IDLE)  # 9 and 6 seconds are ahead
    assert refused.value.status == 429
    assert refused.value.retry_after == pytest.approx(5.0, abs=0.1)
    assert policy.live == 3


def test_requests_sent_away_unread_count_as_usual_ones() -> None:
    policy = taught(admission(max_waiting=2))
    policy.begin([work()] * 4, 0.0)
    times = []
    for _ in range(10):
        with pytest.raises(ApiError) as caught:
            policy.check_room(0.0, IDLE)
        times.append(caught.value.retry_after or 0)
    assert times[9] - times[0] == pytest.approx(9 * (0.1 + 2 / SEATS), rel=0.05)


@dataclass
class Server:
    """A replica in simulated time: seats, prompts in turn, tokens at a steady pace."""

    policy: Admission
    seats: int
    now: float = 0.0
    prefill_free: float = 0.0
    events: list[tuple[float, int, str, Ticket, int]] = field(default_factory=list)
    waiting: list[tuple[Ticket, int]] = field(default_factory=list)
    running: int = 0
    served: int = 0

    def accept(self, each: Work, answer: int) -> None:
        [ticket] = self.policy.begin([each], self.now)
        self.waiting.append((ticket, answer))
        self._seat()

    def _seat(self) -> None:
        while self.waiting and self.running < self.seats:
            ticket, answer = self.waiting.pop(0)
            self.running += 1
            begun = max(self.now, self.prefill_free)
            self.prefill_free = begun + ticket.work.prompt_tokens * PREFILL_S
            self._push(self.prefill_free, "first", ticket, answer)

    def _push(self, at: float, what: str, ticket: Ticket, answer: int) -> None:
        heapq.heappush(self.events, (at, id(ticket), what, ticket, answer))

    def advance(self, until: float) -> None:
        while self.events and self.events[0][0] <= until:
            self.now, _, what, ticket, answer = heapq.heappop(self.events)
            if what == "first":
                self.policy.first_token(ticket, self.now)
                ticket.emitted = answer
                self._push(self.now + (answer - 1) * TOKEN_S, "end", ticket, answer)
            else:
                self.policy.end(ticket, self.now)
                self.running -= 1
                self.served += 1
                self._seat()
        self.now = until


@pytest.mark.parametrize("seed", range(5))
def test_a_crowd_of_many_minutes_comes_in_turns(seed: int) -> None:
    """Nobody is told more than a minute, so they come several times, but not all at once."""
    rng = random.Random(seed)
    policy = taught(admission(max_queue_s=5.0, max_waiting=8))
    server = Server(policy, SEATS)
    num = 500
    arrivals = [(rng.uniform(0, 1), 0, i) for i in range(num)]
    heapq.heapify(arrivals)
    most = 0
    while arrivals:
        at, tries, who = heapq.heappop(arrivals)
        server.advance(at)
        again = asked(policy, [work(10)], server.now)
        if again is None:
            server.accept(work(10), rng.randint(15, 25))
        else:
            most = max(most, tries + 1)
            heapq.heappush(arrivals, (at + again, tries + 1, who))
    takes_s = num * (0.1 + 2 / SEATS)
    assert server.now < 1.25 * takes_s, "it stood idle while they waited"
    server.advance(10**6)
    assert server.served == num
    assert most <= 2 + 1.5 * takes_s / MAX_RETRY_S


@pytest.mark.parametrize("seed", range(5))
def test_the_patient_are_served_after_a_storm_of_others(seed: int) -> None:
    rng = random.Random(seed)
    policy = taught(admission(max_queue_s=5.0, max_waiting=8))
    server = Server(policy, SEATS)
    # Odd ones do not wait as they are told, but give up after ten seconds.
    arrivals = [(rng.uniform(0, 1), 0, i) for i in range(80)]
    heapq.heapify(arrivals)
    left: set[int] = set()
    waits: list[float] = []
    while arrivals:
        at, tries, who = heapq.heappop(arrivals)
        server.advance(at)
        again = asked(policy, [work(10)], server.now)
        if again is None:
            server.accept(work(10), rng.randint(15, 25))
            waits += [at] if who % 2 == 0 else []
        elif who % 2 == 0:
            assert tries < 6
            heapq.heappush(arrivals, (at + again, tries + 1, who))
        elif at < 10:
            heapq.heappush(arrivals, (at + 0.02, tries + 1, who))
        else:
            left.add(who)
    server.advance(10**6)
    assert server.served == 80 - len(left)
    assert len(waits) == 40
    assert max(waits) < 10 + 2 * MAX_RETRY_S


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("known", [False, True])
def test_clients_that_come_when_they_are_told_are_served(seed: int, known: bool) -> None:
    """A crowd many times what may wait: nobody is sent away more than a few times."""
    rng = random.Random(seed)
    policy = admission(max_queue_s=5.0, max_waiting=8)
    if known:
        taught(policy)
    server = Server(policy, SEATS)
    arrivals = [(rng.uniform(0, 1), 0, i) for i in range(60)]
    heapq.heapify(arrivals)
    refusals = [0] * len(arrivals)
    while arrivals:
        at, tries, who = heapq.heappop(arrivals)
        server.advance(at)
        each = work(rng.randint(5, 15))
        again = asked(policy, [each], server.now)
        if again is None:
            server.accept(each, rng.randint(15, 25))
        else:
            refusals[who] = tries + 1
            heapq.heappush(arrivals, (at + again, tries + 1, who))
        assert policy.live <= SEATS + 8
    server.advance(10**6)
    assert server.served == 60
    assert policy.live == 0
    assert max(refusals) >= 1, "nobody was ever sent away: the test says nothing"
    assert max(refusals) <= 4
    assert sum(refusals) <= 3 * 60
