"""The sequence cache against a memory that knows what every block and every state really holds."""

from __future__ import annotations

from random import Random
from zlib import crc32

from hypothesis import strategies as st
from hypothesis.stateful import initialize, precondition, rule

from router.block_manager import NO_BLOCK
from router.limits import EngineLimits
from router.prefix_keys import PrefixKeys
from router.sequence import Sequence, SequenceStatus
from router.sequence_cache import Match, SequenceCache
from router.step import NOTHING, Admit, SamplingParams, Want
from tests.router.cache_memory import Content, Memory, Plan
from tests.router.drawn_limits import engine_limits
from tests.router.machines import Machine, drive, every_length

MAX_LENGTH = 26
indices = st.integers(0, 10**6)


class SequenceCacheMachine(Machine):
    """`findable` is what each published block holds until it is handed out again."""

    @initialize(limits=engine_limits(MAX_LENGTH))
    def create(self, limits: EngineLimits) -> None:
        self.limits = limits
        self.cache = SequenceCache(self.limits)
        self.memory = Memory(self.limits)
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.plans: list[Plan] = []
        self.findable: dict[int, Content] = {}
        self.num_sequences = 0

    @property
    def idle(self) -> list[Sequence]:
        return [seq for seq in self.running if not seq.num_in_flight]

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
        self.num_sequences += 1
        admit = Admit(
            seq_id=self.num_sequences,
            epoch=0,
            prompt=tuple(prompt),
            sampling=SamplingParams(max_tokens=MAX_LENGTH),
            cache_salt=salt,
            want=want,
        )
        arrival = self.num_sequences
        seq = Sequence.from_admit(admit, max_model_len=MAX_LENGTH, arrival=arrival)
        self.waiting.append(seq)

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
        chosen = [seq for i, seq in enumerate(self.idle) if i not in skipped and self.grow(seq)]
        chosen += [seq for seq in self.waiting[:num_starts] if self.start(seq, spare)]
        rows = []
        for seq in chosen:
            most = min(chunk, seq.num_pending)
            num_tokens = self.cache.chunk(seq, most)
            assert 1 <= num_tokens <= most
            rows.append((seq, seq.next_chunk(num_tokens)))
            seq.num_in_flight += 1
        if rows:
            self.plans.append(Plan(self.cache.take_ops(), rows))
        elif self.idle:
            self.stop(len(self.idle) - 1, comes_back=True)

    def grow(self, seq: Sequence) -> bool:
        before = len(seq.blocks)
        missing = max(0, -(-seq.length // self.limits.block_size) - before)
        enough = missing <= self.limits.num_blocks - len(self.held_by(self.running))
        assert self.cache.grow(seq) == enough
        self.forget(seq.blocks[before:])
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
        self.forget(seq.blocks[len(match.blocks) :])
        self.memory.tables[seq.seq_id] = []
        seq.status = SequenceStatus.RUNNING
        self.waiting.remove(seq)
        self.running.append(seq)
        return True

    def ask_awaits(self, seq: Sequence, match: Match) -> None:
        """True only while somebody who runs has yet to compute the next block of the same."""
        if self.cache.awaits(seq, match):
            end = (len(match.blocks) + 1) * self.limits.block_size
            assert end < seq.length
            wanted = self.memory.content(seq, end)
            contents = [
                self.memory.content(other, end)
                for other in self.running
                if other.num_computed < end
            ]
            assert wanted in contents, "nobody is about to compute it"

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
        self.plan(num_starts, spare=0, skipped=set(), chunk=chunk)
        while self.plans:
            self.land(0)

    @precondition(lambda self: self.plans)
    @rule(which=indices)
    def land(self, which: int) -> None:
        """The result of any step in flight; those before it have run as well."""
        place = which % len(self.plans)
        for plan in self.plans[: place + 1]:
            if not plan.has_run:
                self.memory.run(plan)
        for seq, row in self.plans.pop(place).rows:
            seq.landed(row)
            start, blocks = seq.num_computed, seq.blocks.copy()
            self.cache.computed(seq, row.num_tokens)
            self.record(seq, start, blocks)
            if not seq.num_pending:
                self.sample(seq)

    def record(self, seq: Sequence, start: int, blocks: list[int]) -> None:
        """Blocks that are full now can be found, one for each content; old ones are given up."""
        size = self.limits.block_size
        for index in range(start // size, seq.num_computed // size):
            content = self.memory.content(seq, (index + 1) * size)
            known = content in self.findable.values() or blocks[index] in self.findable
            if self.limits.prefix_caching and not known:
                self.findable[blocks[index]] = content
        first_read = max(0, seq.num_computed - (self.limits.window or MAX_LENGTH) + 1)
        assert set(seq.blocks[: first_read // size]) <= {NO_BLOCK}, "more than the window is held"

    def sample(self, seq: Sequence) -> None:
        seq.tokens.append(crc32(bytes(seq.tokens)) % 3)
        if seq.length == seq.max_length:
            self.vacate(seq)
        elif seq.length - 1 == self.limits.reprefill_length:
            self.vacate(seq)
            self.waiting.append(seq)

    def vacate(self, seq: Sequence) -> None:
        self.cache.vacate(seq)
        seq.status = SequenceStatus.WAITING
        self.running.remove(seq)

    @precondition(lambda self: self.idle)
    @rule(which=indices, comes_back=st.booleans())
    def stop(self, which: int, comes_back: bool) -> None:
        """Preempt or abort."""
        seq = self.idle[which % len(self.idle)]
        self.vacate(seq)
        if comes_back:
            self.waiting.insert(0, seq)

    def forget(self, blocks: list[int]) -> None:
        for block in blocks:
            self.findable.pop(block, None)

    def best(self, seq: Sequence) -> Match:
        """The longest beginning that is there, by trying all of them."""
        size, limits = self.limits.block_size, self.limits
        if seq.want != NOTHING:
            return Match()
        block_of = {content: block for block, content in self.findable.items()}
        for num in range((seq.length - 1) // size, 0, -1):
            # The last block is always wanted, and all that the next token reads.
            reads_all = limits.window is None or limits.num_state_slots > 0
            first_read = 0 if reads_all else num * size - (limits.window or 0) + 1
            behind = max(0, min(first_read // size, num - 1))
            contents = [self.memory.content(seq, (i + 1) * size) for i in range(behind, num)]
            if all(content in block_of for content in contents):
                blocks = (NO_BLOCK,) * behind + tuple(block_of[content] for content in contents)
                return Match(blocks, self.usable(seq, num) * size)
        return Match()

    def usable(self, seq: Sequence, num: int) -> int:
        if not self.limits.num_state_slots:
            return num
        _, is_long, tokens = self.memory.content(seq, seq.length)
        regime = "long" if is_long else "short"
        keys = PrefixKeys(self.limits.block_size, regime=regime, salt=seq.cache_salt)
        kept = [key in self.cache.snapshots for key in keys.up_to(tokens, seq.length)]
        return max((i + 1 for i in range(num) if kept[i]), default=0)

    def check(self) -> None:
        self.cache.check_invariants(self.running)
        for seq in self.waiting:
            assert self.cache.match(seq) == self.best(seq)
        for block, content in self.findable.items():
            salt, is_long, tokens = content
            ends = range(len(tokens) - self.limits.block_size + 1, len(tokens) + 1)
            assert self.memory.block(block) == [(salt, is_long, tokens[:end]) for end in ends]
        holders: dict[int, set[tuple[int, Content]]] = {}
        for seq in self.running:
            for index, block in enumerate(seq.blocks):
                whole = self.memory.content(seq, (index + 1) * self.limits.block_size)
                holders.setdefault(block, set()).add((index, whole))
        holders.pop(NO_BLOCK, None)
        assert all(len(contents) == 1 for contents in holders.values()), "a block means two things"

    def finish(self) -> None:
        while self.plans:
            self.land(0)
        for seq in self.running.copy():
            self.vacate(seq)
        self.check()
        assert (self.cache.blocks.num_used, self.cache.slots.num_used) == (0, 0)


@every_length
def test_sequence_cache_agrees_with_what_the_memory_holds(num_operations: int) -> None:
    drive(SequenceCacheMachine, num_operations)
