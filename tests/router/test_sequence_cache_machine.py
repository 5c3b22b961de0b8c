"""The sequence cache against a memory that knows what every block and every state really holds."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from random import Random

from hypothesis import strategies as st
from hypothesis.stateful import initialize, precondition, rule

from router.block_manager import NO_BLOCK
from router.limits import EngineLimits
from router.sequence import Sequence, SequenceStatus
from router.sequence_cache import Match, SequenceCache
from router.step import NOTHING, Admit, SamplingParams, Want
from tests.router.cache_memory import Content, Findable, Memory, Plan
from tests.router.drawn_limits import engine_limits
from tests.router.machines import Machine, drive, every_length

MAX_LENGTH = 26
indices = st.integers(0, 10**6)


class SequenceCacheMachine(Machine):
    """Plans what it likes; compares all that the cache says with what the memory holds."""

    @initialize(limits=engine_limits(MAX_LENGTH))
    def create(self, limits: EngineLimits) -> None:
        self.limits = limits
        self.cache = SequenceCache(self.limits)
        self.memory = Memory(self.limits)
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.plans: list[Plan] = []
        self.findable = Findable(self.limits)
        self.admits: dict[int, Admit] = {}

    @property
    def idle(self) -> list[Sequence]:
        return [seq for seq in self.running if not seq.num_in_flight]

    def content(self, seq: Sequence, num_tokens: int) -> Content:
        """What its first tokens are computed to, now or when it starts."""
        if seq in self.running:
            return self.memory.known[seq.seq_id].content(num_tokens)
        is_long = self.memory.is_long(seq.length)
        return seq.cache_salt, is_long, tuple(seq.tokens[:num_tokens])

    @precondition(lambda self: len(self.waiting) < 4)
    @rule(
        family=st.integers(0, 1),
        own=st.integers(0, 2),
        num_prompt=st.integers(1, MAX_LENGTH - 1),
        parts_at=st.sampled_from([MAX_LENGTH, MAX_LENGTH // 2]) | st.integers(0, MAX_LENGTH),
        salt=st.sampled_from(["", "", "", "mine"]),
        want=st.sampled_from([NOTHING] * 5 + [Want(prompt_logprobs=0)]),
    )
    def arrive(
        self, family: int, own: int, num_prompt: int, parts_at: int, salt: str, want: Want
    ) -> None:
        shared, rest = Random(family), Random(100 + own)
        prompt = [(shared if i < parts_at else rest).randrange(3) for i in range(num_prompt)]
        number = len(self.admits)
        self.admits[number] = admit = Admit(
            seq_id=number,
            epoch=0,
            prompt=tuple(prompt),
            sampling=SamplingParams(max_tokens=MAX_LENGTH),
            cache_salt=salt,
            want=want,
        )
        seq = Sequence.from_admit(admit, max_model_len=MAX_LENGTH, arrival=number)
        self.waiting.append(seq)

    @precondition(lambda self: len(self.plans) < self.limits.num_steps)
    @rule(
        num_starts=st.integers(0, 2),
        spare=st.integers(0, 2),
        skipped=st.sets(st.integers(0, 4), max_size=3),
        chunk=st.integers(1, MAX_LENGTH),
    )
    def plan(self, num_starts: int, spare: int, skipped: set[int], chunk: int) -> None:
        """A step of some that run and some that start; each gets `chunk` tokens or less.

        Where nobody gets on, one gives way.
        """
        ready = [seq for seq in self.running if self.goes_on(seq)]
        chosen = [seq for i, seq in enumerate(ready) if i not in skipped and self.grow(seq)]
        chosen += [seq for seq in self.waiting[:num_starts] if self.start(seq, spare)]
        rows = []
        for seq in chosen:
            if seq.num_in_flight:
                self.cache.keep_state(seq)
            seq.num_in_flight += 1
            most = min(chunk, seq.num_pending)
            num_tokens = self.cache.chunk(seq, most)
            assert 1 <= num_tokens <= most
            rows.append((seq, seq.next_chunk(num_tokens)))
        if rows:
            self.plans.append(Plan(self.cache.take_ops(), rows))
        elif self.idle:
            self.stop(self.running.index(self.idle[-1]), "preempt")

    def goes_on(self, seq: Sequence) -> bool:
        """One in flight only if the row that runs neither ends it nor starts it again."""
        if not seq.num_in_flight:
            return True
        length = seq.planned_length
        crosses = seq.num_coming and length - 1 == self.limits.reprefill_length
        may = self.limits.lookahead and not seq.ended and not crosses
        return may and seq.num_pending > 0 and length < seq.max_length

    def grow(self, seq: Sequence) -> bool:
        before = len(seq.blocks)
        missing = max(0, -(-seq.planned_length // self.limits.block_size) - before)
        enough = missing <= self.limits.num_blocks - len(self.held_by(self.running))
        assert self.cache.grow(seq) == enough
        self.findable.forget(seq.blocks[before:])
        return enough

    def start(self, seq: Sequence, spare: int) -> bool:
        match = self.cache.match(seq)
        self.ask_awaits(seq, match)
        fits = self.cache.fits(seq, match, spare=spare, without=())
        assert fits == self.has_room(seq, match, spare, self.running)
        most = self.limits.num_state_slots or self.limits.max_num_seqs
        if not fits or len(self.running) == most:
            return False
        self.cache.start(seq, match)
        assert seq.num_computed == match.num_tokens
        assert tuple(seq.blocks[: len(match.blocks)]) == match.blocks
        self.findable.forget(seq.blocks[len(match.blocks) :])
        seq.status = SequenceStatus.RUNNING
        self.memory.introduce(seq)
        self.waiting.remove(seq)
        self.running.append(seq)
        return True

    def ask_awaits(self, seq: Sequence, match: Match) -> None:
        """True only while somebody who runs has yet to compute the next block of the same."""
        if self.cache.awaits(seq, match):
            end = (len(match.blocks) + 1) * self.limits.block_size
            assert end < seq.length
            wanted = self.content(seq, end)
            others = [seq for seq in self.running if seq.num_computed < end <= seq.length]
            assert wanted in [self.content(other, end) for other in others], "nobody computes it"

    def held_by(self, sequences: list[Sequence]) -> set[int]:
        return {block for seq in sequences for block in seq.blocks} - {NO_BLOCK}

    def has_room(self, seq: Sequence, match: Match, spare: int, running: list[Sequence]) -> bool:
        """Whether all its blocks and the spare ones exist beside what the others hold."""
        num_more = -(-seq.length // self.limits.block_size) - len(match.blocks)
        used = self.held_by(running) | set(match.blocks) - {NO_BLOCK}
        return len(used) + num_more + spare <= self.limits.num_blocks

    @precondition(lambda self: self.waiting and self.idle)
    @rule(which=indices, without=st.sets(st.integers(0, 4)), spare=st.integers(0, 3))
    def ask_room(self, which: int, without: set[int], spare: int) -> None:
        """Whether it would fit if some others gave up what they hold."""
        seq = self.waiting[which % len(self.waiting)]
        gone = [other for i, other in enumerate(self.idle) if i in without]
        left = [other for other in self.running if other not in gone]
        match = self.cache.match(seq)
        fits = self.cache.fits(seq, match, spare=spare, without=gone)
        assert fits == self.has_room(seq, match, spare, left)

    @rule(num_starts=st.integers(0, 2), chunk=st.integers(4, MAX_LENGTH))
    def plan_and_land(self, num_starts: int, chunk: int) -> None:
        """Everybody gets on."""
        if len(self.plans) == self.limits.num_steps:
            self.land(0)
        self.plan(num_starts, spare=0, skipped=set(), chunk=chunk)
        if self.plans:
            self.land(0)

    @precondition(lambda self: self.plans)
    @rule(which=indices)
    def land(self, which: int) -> None:
        """The result of any step in flight; those before it have run as well."""
        place = 0 if self.limits.lookahead else which % len(self.plans)
        for plan in self.plans[: place + 1]:
            if not plan.has_run:
                self.memory.run(plan)
        plan = self.plans.pop(place)
        for seq, row in plan.rows:
            start, blocks = seq.num_computed, seq.blocks.copy()
            seq.landed(row)
            self.cache.computed(seq, row.num_tokens)
            self.record(seq, start, blocks)
            if seq.ended:
                self.end(seq)
            elif row.samples:
                self.emit(seq, plan.sampled[seq.seq_id])

    def record(self, seq: Sequence, start: int, blocks: list[int]) -> None:
        """Blocks that are full now can be found, one for each content; old ones are given up."""
        size = self.limits.block_size
        for index in range(start // size, min(seq.num_computed, seq.length) // size):
            self.findable.publish(blocks[index], self.content(seq, (index + 1) * size))
        first_read = max(0, seq.num_computed - (self.limits.window or MAX_LENGTH) + 1)
        assert set(seq.blocks[: first_read // size]) <= {NO_BLOCK}, "more than the window is held"

    def emit(self, seq: Sequence, token: int) -> None:
        seq.tokens.append(token)
        if seq.length == seq.max_length:
            self.end(seq)
        elif seq.length - 1 == self.limits.reprefill_length:
            self.vacate(seq)
            self.waiting.append(seq)

    def end(self, seq: Sequence) -> None:
        """At once, or when the steps that still write it are back."""
        seq.ended = True
        if not seq.num_in_flight:
            self.vacate(seq)

    def vacate(self, seq: Sequence) -> None:
        self.cache.vacate(seq)
        seq.status = SequenceStatus.WAITING
        self.running.remove(seq)

    @precondition(lambda self: self.running)
    @rule(which=indices, how=st.sampled_from(["abort", "preempt", "preempt", "lose all"]))
    def stop(self, which: int, how: str) -> None:
        """Nobody in flight can be preempted."""
        seq = self.running[which % len(self.running)]
        if how == "lose all":
            self.lose_all(num_run=which % (len(self.plans) + 1))
        elif how == "preempt" and not seq.num_in_flight:
            self.vacate(seq)
            self.waiting.insert(0, seq)
        else:
            self.end(seq)

    def lose_all(self, num_run: int) -> None:
        """All but the memory: some steps have run and nobody will hear of it, others never will."""
        for plan in self.plans[:num_run]:
            if not plan.has_run:
                self.memory.run(plan)
        self.cache.forget_all(self.running, [op for plan in self.plans for op in plan.ops])
        left = [seq for seq in [*self.waiting, *self.running] if not seq.ended]
        self.plans, self.running = [], []
        self.waiting = [self.again(seq) for seq in left]

    def again(self, seq: Sequence) -> Sequence:
        """The same as the journal would admit it."""
        admit = replace(self.admits[seq.seq_id], emitted=tuple(seq.tokens[seq.num_prompt :]))
        return Sequence.from_admit(admit, max_model_len=MAX_LENGTH, arrival=seq.arrival)

    def best(self, seq: Sequence) -> Match:
        """The longest beginning that is there."""
        if seq.want != NOTHING:
            return Match()
        blocks = self.findable.longest(seq.length - 1, partial(self.content, seq))
        return Match(blocks, self.usable(seq, len(blocks)) * self.limits.block_size)

    def usable(self, seq: Sequence, num: int) -> int:
        if not self.limits.num_state_slots:
            return num
        keys = self.memory.keys(self.content(seq, num * self.limits.block_size))
        return max((i + 1 for i, key in enumerate(keys) if key in self.cache.snapshots), default=0)

    def check(self) -> None:
        self.cache.check_invariants(self.running)
        for seq in self.waiting:
            assert self.cache.match(seq) == self.best(seq)
        for block, content in self.findable.holds.items():
            salt, is_long, tokens = content
            ends = range(len(tokens) - self.limits.block_size + 1, len(tokens) + 1)
            assert self.memory.block(block) == [(salt, is_long, tokens[:end]) for end in ends]
        holders: dict[int, set[tuple[int, Content]]] = {}
        for seq in self.running:
            for index, block in enumerate(seq.blocks):
                end = min((index + 1) * self.limits.block_size, seq.length)
                holders.setdefault(block, set()).add((index, self.content(seq, end)))
        holders.pop(NO_BLOCK, None)
        assert all(len(contents) == 1 for contents in holders.values()), "a block means two things"

    def finish(self) -> None:
        """Everything goes back, and what is kept is what its name says."""
        while self.plans:
            self.land(0)
        self.memory.run(Plan(self.cache.take_ops(), []))
        for known in self.memory.known.values():
            for index, key in enumerate(self.memory.keys(known.content(len(known.tokens)))):
                if key in self.cache.snapshots:
                    state = self.memory.states[self.cache.snapshots.use(key)]
                    assert state == known.content((index + 1) * self.limits.block_size)
        for seq in self.running.copy():
            self.vacate(seq)
        self.check()
        assert (self.cache.blocks.num_used, self.cache.slots.num_used) == (0, 0)


@every_length
def test_sequence_cache_agrees_with_what_the_memory_holds(num_operations: int) -> None:
    drive(SequenceCacheMachine, 2 * num_operations)
