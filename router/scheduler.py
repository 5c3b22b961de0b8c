"""Who computes which tokens in the next step: continuous batching without phases."""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterator
from collections.abc import Sequence as Seq

from router.limits import EngineLimits
from router.sequence import MAX_OVERTAKES, Sequence, SequenceStatus
from router.sequence_cache import Match, SequenceCache
from router.step import StepPlan

MAX_SKIPPED = 32
"""How many waiting sequences that do not fit one step looks past."""


def split_budget(budget: int, needs: Seq[int]) -> list[int]:
    """Tokens for each prefill that needs `needs[i]`, in order of rank; at least 1 each.

    The first gets half of the budget, the shortest of the others the next tokens, and the first
    what is left: a huge prompt neither blocks short ones nor starves. Needs budget >= len(needs).
    """
    chunks = [1] * len(needs)
    left = budget - len(needs)
    assert left >= 0, f"{len(needs)} prefills share {budget} tokens"
    others = sorted(range(1, len(needs)), key=needs.__getitem__)
    turns = [(0, max(1, budget // 2)), *((i, budget) for i in others), (0, budget)]
    for i, cap in turns if needs else ():
        extra = min(left, min(cap, needs[i]) - chunks[i])
        if extra > 0:
            chunks[i] += extra
            left -= extra
    return chunks


def worth_starting(budget: int, needs: Seq[int], need: int) -> bool:
    """Whether a further prefill would get more of `split_budget` than a token to hold its place."""
    if len(needs) >= budget:
        return False
    if not needs or sum(needs) + need <= budget:
        return True
    return split_budget(budget, [*needs, need])[-1] >= min(need, 2)


class Scheduler:
    """Owns waiting and running sequences and what they hold; no I/O, no clock.

    A sequence takes the blocks of all its known tokens when it starts and grows by decoding.
    When blocks run out, better ranks preempt worse ones and the worst waits, so the best always
    advances; a waiting sequence preempts only worse priorities. `released` collects what the
    stages must forget with the next plan.
    """

    def __init__(self, limits: EngineLimits, cache: SequenceCache) -> None:
        self.limits = limits
        self.cache = cache
        self.waiting: list[Sequence] = []
        self.running: dict[int, Sequence] = {}
        self.released: list[int] = []
        self.num_preemptions = 0
        self.num_started_tokens = 0
        self.num_hit_tokens = 0

    def add(self, seq: Sequence) -> None:
        """Queue a waiting sequence at its rank."""
        insort(self.waiting, seq, key=lambda s: s.rank)

    def remove(self, seq: Sequence) -> None:
        """Forget a sequence that is not in flight, and free what it holds."""
        assert not seq.num_in_flight, f"sequence {seq.seq_id} is in flight"
        if seq.status is SequenceStatus.WAITING:
            self.waiting.remove(seq)
        else:
            self._vacate(seq)

    def schedule(self, *, epoch: int, step_id: int, num_in_flight: int) -> StepPlan | None:
        """The next step's plan, its sequences marked in flight; None when nothing can run now.

        While nothing is in flight and any sequence is left, there is always a plan.
        """
        ahead = self.limits.lookahead and num_in_flight > 0
        if ahead and self._must_take_back():
            return None
        started = self._make_way(step_id)
        continued = self._continue_running(step_id, len(started))
        decodes: list[Sequence] = []
        prefills = started.copy()
        for seq in continued:
            (decodes if seq.num_pending == 1 else prefills).append(seq)
        prefills.sort(key=lambda s: s.rank)
        budget = self.limits.max_num_batched_tokens - len(decodes)
        more = self._start_waiting(step_id, budget, prefills, num_in_flight)
        started += more
        prefills += more
        chunks = split_budget(budget, [seq.num_pending for seq in prefills])
        chunks = [self.cache.chunk(seq, n) for seq, n in zip(prefills, chunks, strict=True)]
        work = [*((seq, 1) for seq in decodes), *zip(prefills, chunks, strict=True)]
        if not work:
            return None
        released, self.released = tuple(self.released), []
        return StepPlan(
            epoch=epoch,
            step_id=step_id,
            new=tuple(seq.introduction() for seq in started),
            state_ops=self.cache.take_ops(),
            scheduled=tuple(seq.next_chunk(num_tokens) for seq, num_tokens in work),
            released=released,
        )

    def _must_take_back(self) -> bool:
        """Whether a running sequence would have to give way: none can while it is in flight."""
        if sum(map(self.cache.missing_blocks, self._ready())) > self.cache.blocks.num_free:
            return True
        first = self.waiting[0] if self.waiting else None
        return (
            first is not None
            and any(self._yields(seq, first) for seq in self.running.values())
            and not self._fits(first, self.cache.match(first))
        )

    def _ready(self) -> list[Sequence]:
        """Running sequences that may be in the next step."""
        running = self.running.values()
        return [seq for seq in running if not seq.num_in_flight or self._may_follow(seq)]

    def _may_follow(self, seq: Sequence) -> bool:
        """With lookahead, unless the token to come ends the sequence or starts it again."""
        if seq.num_in_flight > self.limits.lookahead or seq.ended or not seq.num_pending:
            return False
        next_length = seq.planned_length
        crosses = seq.num_coming and next_length - 1 == self.limits.reprefill_length
        return not crosses and (next_length < seq.max_length or not seq.continues)

    def _continue_running(self, step_id: int, num_started: int) -> list[Sequence]:
        """Mark in flight the running sequences that take part, longest idle first.

        With several steps in flight each gets its share of the running set, so that all stages
        of the pipeline have work; whoever cannot grow now gives its place to the next. Decoding
        sequences that are `few_tokens` at most take one step all together, when all are back.
        """
        decoding = [seq for seq in self.running.values() if seq.decodes]
        together = self._go_together(len(decoding))
        waits = together and any(seq.num_in_flight for seq in decoding)
        apart = len(self.running) - (len(decoding) if together else 0)
        share = -(-apart // self.limits.max_in_flight) - num_started
        chosen: list[Sequence] = []
        for seq in sorted(self._ready(), key=lambda s: (s.last_step, s.rank)):
            joins = together and seq.decodes
            if waits if joins else share <= 0:
                continue
            if seq.status is SequenceStatus.RUNNING and self._grow(seq):
                self._take_off(seq, step_id)
                chosen.append(seq)
                share -= not joins
        return chosen

    def _go_together(self, num_decoding: int) -> bool:
        limits = self.limits
        if limits.max_in_flight == 1 or limits.few_tokens is None:
            return False
        # The others get one token at least.
        fit = len(self.running) <= limits.max_num_batched_tokens
        return num_decoding <= limits.few_tokens and fit

    def _grow(self, seq: Sequence) -> bool:
        """Give a running sequence the blocks of its known tokens, preempting worse ranks."""
        while not self.cache.grow(seq):
            victim = max(self._idle(), key=lambda s: s.rank)
            # Without a worse idle one it keeps what it holds and waits: the better ones get on.
            if victim.rank <= seq.rank:
                return False
            victim.overtaken += seq.arrival > victim.arrival
            self._preempt(victim)
        return True

    def _start_waiting(
        self, step_id: int, budget: int, prefills: Seq[Sequence], num_in_flight: int
    ) -> list[Sequence]:
        """Start what fits, by rank; a sequence that does not fit is passed a bounded number of
        times by later ones that do."""
        limits = self.limits
        startable = min(len(self.waiting), max(1, limits.num_seats - len(self.running)))
        share = -(-startable // max(1, limits.max_in_flight - num_in_flight))
        needs = [seq.num_pending for seq in prefills]
        started: list[Sequence] = []
        skipped = 0
        for seq in self.waiting[: limits.num_seats + MAX_SKIPPED]:
            if len(started) == share or len(needs) >= budget or skipped > MAX_SKIPPED:
                break
            aged = seq.overtaken >= MAX_OVERTAKES
            match = self.cache.match(seq)
            need = seq.length - match.num_tokens
            if not aged and (
                self.cache.awaits(seq, match) or not worth_starting(budget, needs, need)
            ):
                skipped += 1
                continue
            if not self._fits(seq, match):
                if aged or len(self.running) >= limits.num_seats:
                    break
                skipped += 1
                continue
            self._start(seq, match, step_id)
            started.append(seq)
            needs.append(need)
        return started

    def _fits(self, seq: Sequence, match: Match, without: Seq[Sequence] = ()) -> bool:
        """Whether a waiting sequence could start if those in `without` did not run.

        Each running sequence's next block stays free, or the newcomer would soon be preempted.
        """
        num_running = len(self.running) - len(without)
        return num_running < self.limits.num_seats and self.cache.fits(
            seq, match, spare=num_running, without=without
        )

    def _make_way(self, step_id: int) -> list[Sequence]:
        """Start the first of the queue in the place of sequences of worse priority, if it must
        and that is enough."""
        if not self.waiting:
            return []
        first = self.waiting[0]
        match = self.cache.match(first)
        if self._fits(first, match):
            return []
        worse = [s for s in self._idle() if self._yields(s, first)]
        worse.sort(key=lambda s: s.rank)
        victims: list[Sequence] = []
        while not self._fits(first, match, victims):
            if not worse:
                return []
            victims.append(worse.pop())
        for victim in victims:
            self._preempt(victim)
        self._start(first, self.cache.match(first), step_id)
        return [first]

    @staticmethod
    def _yields(seq: Sequence, first: Sequence) -> bool:
        """Whether a running sequence gives its place to the first of the queue."""
        return seq.tier > first.tier and seq.priority > first.priority

    def _start(self, seq: Sequence, match: Match, step_id: int) -> None:
        self.waiting.remove(seq)
        seq.status = SequenceStatus.RUNNING
        self.cache.start(seq, match)
        self.num_started_tokens += seq.length
        self.num_hit_tokens += match.num_tokens
        if seq.num_hit is None:
            seq.num_hit = match.num_tokens
        self.running[seq.seq_id] = seq
        self._take_off(seq, step_id)
        overtaken = [other for other in self.waiting if other.arrival < seq.arrival]
        for other in overtaken:
            other.overtaken += 1
        if overtaken:
            self.waiting.sort(key=lambda s: s.rank)

    def _take_off(self, seq: Sequence, step_id: int) -> None:
        if seq.num_in_flight:
            self.cache.keep_state(seq)
        seq.num_in_flight += 1
        seq.last_step = step_id

    def _preempt(self, victim: Sequence) -> None:
        """Take everything from a running sequence; it is recomputed from its tokens later."""
        self.num_preemptions += 1
        self.restart(victim)

    def restart(self, seq: Sequence) -> None:
        """Have a running sequence, not in flight, start again from its tokens."""
        self._vacate(seq)
        self.add(seq)

    def _vacate(self, seq: Sequence) -> None:
        del self.running[seq.seq_id]
        self.released.append(seq.seq_id)
        self.cache.vacate(seq)
        seq.status = SequenceStatus.WAITING

    def _idle(self) -> Iterator[Sequence]:
        return (seq for seq in self.running.values() if not seq.num_in_flight)

    def check_invariants(self) -> None:
        """What is held belongs to running sequences, waiting ones hold nothing, in order."""
        self.cache.check_invariants(self.running.values())
        assert len(self.running) <= self.limits.num_seats, "more sequences run than may"
        for seq in self.running.values():
            assert seq.status is SequenceStatus.RUNNING
            assert seq.num_computed < seq.length <= seq.max_length or seq.ended
            assert seq.num_in_flight <= 1 + self.limits.lookahead
            assert seq.num_coming <= seq.num_in_flight <= seq.num_ahead
        for seq in self.waiting:
            assert seq.status is SequenceStatus.WAITING
            held = (seq.num_in_flight, seq.blocks, seq.slot, seq.num_computed, seq.num_sent_blocks)
            assert held == (0, [], -1, 0, 0), "a waiting sequence holds something"
            assert seq.seq_id not in self.running, "a sequence waits and runs"
        ranks = [seq.rank for seq in self.waiting]
        assert ranks == sorted(ranks), "the waiting queue is out of order"
