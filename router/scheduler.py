"""Who computes which tokens in the next step: continuous batching without phases."""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass

from router.block_manager import BlockManager
from router.sequence import MAX_OVERTAKES, Sequence, SequenceStatus
from router.state_slots import StateSlots
from router.step import StateOp, StateOpKind, StepPlan

MAX_SKIPPED = 32
"""How many waiting sequences that do not fit one step looks past."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineLimits:
    """What the scheduler may use. `num_state_slots` is 0 without recurrent layers.

    Above `reprefill_length` known tokens a sequence's cache has another content (LongRoPE).
    """

    block_size: int
    num_blocks: int
    num_state_slots: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    reprefill_length: int | None = None
    max_in_flight: int = 1

    def __post_init__(self) -> None:
        for name in ("block_size", "num_blocks", "max_num_seqs", "max_in_flight"):
            _require(name, getattr(self, name), 1)
        _require("max_num_batched_tokens", self.max_num_batched_tokens, 1)
        _require("max_model_len", self.max_model_len, 2)
        _require("num_state_slots", self.num_state_slots, 0)
        if self.reprefill_length is not None:
            _require("reprefill_length", self.reprefill_length, 1)

    @property
    def num_seats(self) -> int:
        """Sequences that may run at once: no more than the budgets of all steps have tokens."""
        seats = min(self.max_num_seqs, self.max_num_batched_tokens * self.max_in_flight)
        return min(seats, self.num_state_slots) if self.num_state_slots else seats


def _require(name: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f"{name}={value}: allowed {least} or more")


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
    """Owns waiting and running sequences, KV blocks and state slots; no I/O, no clock.

    A sequence takes the blocks of all its known tokens when it starts and grows by decoding.
    When blocks run out, better ranks preempt worse ones and the worst waits, so the best always
    advances; a waiting sequence preempts only worse priorities. `released` collects what the
    stages must forget with the next plan.
    """

    def __init__(self, limits: EngineLimits) -> None:
        self.limits = limits
        self.blocks = BlockManager(limits.num_blocks, limits.block_size)
        self.slots = StateSlots(limits.num_state_slots)
        self.waiting: list[Sequence] = []
        self.running: dict[int, Sequence] = {}
        self.released: list[int] = []
        self.num_preemptions = 0

    def add(self, seq: Sequence) -> None:
        """Queue a waiting sequence at its rank."""
        insort(self.waiting, seq, key=lambda s: s.rank)

    def remove(self, seq: Sequence) -> None:
        """Forget a sequence that is not in flight, and free what it holds."""
        assert not seq.in_flight, f"sequence {seq.seq_id} is in flight"
        if seq.status is SequenceStatus.WAITING:
            self.waiting.remove(seq)
        else:
            self._vacate(seq)

    def schedule(self, *, epoch: int, step_id: int, num_in_flight: int) -> StepPlan | None:
        """The next step's plan, its sequences marked in flight; None when nothing can run now.

        While nothing is in flight and any sequence is left, there is always a plan.
        """
        started = self._make_way(step_id)
        continued = self._continue_running(step_id, len(started))
        decodes = [seq for seq in continued if seq.num_pending == 1]
        prefills = [*started, *(seq for seq in continued if seq.num_pending > 1)]
        prefills.sort(key=lambda s: s.rank)
        budget = self.limits.max_num_batched_tokens - len(decodes)
        more = self._start_waiting(step_id, budget, prefills, num_in_flight)
        started += more
        prefills += more
        chunks = split_budget(budget, [seq.num_pending for seq in prefills])
        work = [*((seq, 1) for seq in decodes), *zip(prefills, chunks, strict=True)]
        if not work:
            return None
        released, self.released = tuple(self.released), []
        return StepPlan(
            epoch=epoch,
            step_id=step_id,
            new=tuple(seq.introduction() for seq in started),
            state_ops=tuple(
                StateOp(kind=StateOpKind.ZERO, target=seq.slot)
                for seq, _ in work
                if seq.num_computed == 0 and seq.slot >= 0
            ),
            scheduled=tuple(seq.next_chunk(num_tokens) for seq, num_tokens in work),
            released=released,
        )

    def _continue_running(self, step_id: int, num_started: int) -> list[Sequence]:
        """Mark in flight the running sequences that take part, longest idle first.

        With several steps in flight each gets its share of the running set, so that all stages
        of the pipeline have work; whoever cannot grow now gives its place to the next.
        """
        share = -(-len(self.running) // self.limits.max_in_flight) - num_started
        chosen: list[Sequence] = []
        for seq in sorted(self._idle(), key=lambda s: (s.last_step, s.rank)):
            if len(chosen) == share:
                break
            if seq.status is SequenceStatus.RUNNING and self._grow(seq):
                self._take_off(seq, step_id)
                chosen.append(seq)
        return chosen

    def _grow(self, seq: Sequence) -> bool:
        """Give a running sequence the blocks of its known tokens, preempting worse ranks."""
        missing = self.blocks.blocks_for(seq.length) - len(seq.blocks)
        while missing > self.blocks.num_free:
            victim = max(self._idle(), key=lambda s: s.rank)
            # Without a worse idle one it keeps what it holds and waits: the better ones get on.
            if victim.rank <= seq.rank:
                return False
            victim.overtaken += seq.arrival > victim.arrival
            self._preempt(victim)
        seq.blocks += self.blocks.allocate(max(0, missing))
        return True

    def _start_waiting(
        self, step_id: int, budget: int, prefills: Seq[Sequence], num_in_flight: int
    ) -> list[Sequence]:
        """Start what fits, by rank; a sequence that does not fit is passed a bounded number of
        times by later ones that do."""
        limits = self.limits
        startable = min(len(self.waiting), max(1, limits.num_seats - len(self.running)))
        share = -(-startable // (limits.max_in_flight - num_in_flight))
        needs = [seq.num_pending for seq in prefills]
        started: list[Sequence] = []
        skipped = 0
        for seq in self.waiting[: limits.num_seats + MAX_SKIPPED]:
            if len(started) == share or len(needs) >= budget or skipped > MAX_SKIPPED:
                break
            aged = seq.overtaken >= MAX_OVERTAKES
            if not aged and not worth_starting(budget, needs, seq.num_pending):
                skipped += 1
                continue
            if not self._fits(seq):
                if aged or len(self.running) >= limits.num_seats:
                    break
                skipped += 1
                continue
            self._start(seq, step_id)
            started.append(seq)
            needs.append(seq.num_pending)
        return started

    def _fits(self, seq: Sequence, without: Seq[Sequence] = ()) -> bool:
        """Whether a waiting sequence could start if those in `without` did not run.

        Each running sequence's next block stays free, or the newcomer would soon be preempted.
        """
        num_running = len(self.running) - len(without)
        free = self.blocks.num_free + sum(len(other.blocks) for other in without) - num_running
        return num_running < self.limits.num_seats and self.blocks.blocks_for(seq.length) <= free

    def _make_way(self, step_id: int) -> list[Sequence]:
        """Start the first of the queue in the place of sequences of worse priority, if it must
        and that is enough."""
        if not self.waiting or self._fits(self.waiting[0]):
            return []
        first = self.waiting[0]
        worse = [s for s in self._idle() if s.tier > first.tier and s.priority > first.priority]
        worse.sort(key=lambda s: s.rank)
        victims: list[Sequence] = []
        while not self._fits(first, victims):
            if not worse:
                return []
            victims.append(worse.pop())
        for victim in victims:
            self._preempt(victim)
        self._start(first, step_id)
        return [first]

    def _start(self, seq: Sequence, step_id: int) -> None:
        self.waiting.remove(seq)
        seq.status = SequenceStatus.RUNNING
        seq.blocks = self.blocks.allocate(self.blocks.blocks_for(seq.length))
        seq.slot = self.slots.allocate() if self.limits.num_state_slots else -1
        self.running[seq.seq_id] = seq
        self._take_off(seq, step_id)
        overtaken = [other for other in self.waiting if other.arrival < seq.arrival]
        for other in overtaken:
            other.overtaken += 1
        if overtaken:
            self.waiting.sort(key=lambda s: s.rank)

    def _take_off(self, seq: Sequence, step_id: int) -> None:
        seq.in_flight = True
        seq.last_step = step_id

    def _preempt(self, victim: Sequence) -> None:
        """Take everything from a running sequence; it is recomputed from its tokens later."""
        self._vacate(victim)
        self.num_preemptions += 1
        self.add(victim)

    def _vacate(self, seq: Sequence) -> None:
        del self.running[seq.seq_id]
        self.released.append(seq.seq_id)
        # Last block first: the head of a prefix outlives its tail in the free queue.
        self.blocks.free(reversed(seq.blocks))
        if seq.slot >= 0:
            self.slots.free(seq.slot)
        seq.status = SequenceStatus.WAITING
        seq.blocks, seq.num_sent_blocks, seq.slot, seq.num_computed = [], 0, -1, 0

    def _idle(self) -> Iterator[Sequence]:
        return (seq for seq in self.running.values() if not seq.in_flight)

    def check_invariants(self) -> None:
        """Every block and slot has exactly one owner, which runs; the queue is in order."""
        self.blocks.check_invariants()
        self.slots.check_invariants()
        blocks = [block for seq in self.running.values() for block in seq.blocks]
        assert len(blocks) == len(set(blocks)) == self.blocks.num_used, "blocks leak or are shared"
        slots = [seq.slot for seq in self.running.values() if seq.slot >= 0]
        assert len(slots) == len(set(slots)) == self.slots.num_used, "slots leak or are shared"
        assert len(self.running) <= self.limits.num_seats, "more sequences run than may"
        for seq in self.running.values():
            assert seq.status is SequenceStatus.RUNNING
            assert (seq.slot >= 0) == (self.limits.num_state_slots > 0)
            assert seq.num_computed < seq.length <= seq.max_length
            assert seq.num_computed <= len(seq.blocks) * self.limits.block_size
            assert seq.num_sent_blocks <= len(seq.blocks)
        for seq in self.waiting:
            assert seq.status is SequenceStatus.WAITING
            held = (seq.in_flight, seq.blocks, seq.slot, seq.num_computed, seq.num_sent_blocks)
            assert held == (False, [], -1, 0, 0), "a waiting sequence holds something"
            assert seq.seq_id not in self.running, "a sequence waits and runs"
        ranks = [seq.rank for seq in self.waiting]
        assert ranks == sorted(ranks), "the waiting queue is out of order"
