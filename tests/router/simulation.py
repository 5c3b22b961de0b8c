"""Simulated stages that remember what was written where, and an ingress that keeps a journal."""

from __future__ import annotations

import zlib
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from random import Random

from router.block_manager import NO_BLOCK
from router.engine import EngineCore, EngineLimits, Executor
from router.step import (
    LAST_SAMPLED,
    NO_TOKEN,
    Admit,
    FinishReason,
    Sampled,
    StateOp,
    StateOpKind,
    StepPlan,
    StepResult,
    Token,
)

VOCAB = 61


def next_token(tokens: Seq[int]) -> int:
    return zlib.crc32(bytes(tokens)) % VOCAB


def solo_run(admit: Admit, max_model_len: int) -> list[tuple[int, FinishReason | None]]:
    """What the request gets alone, written down from the contract."""
    if admit.sampling.max_tokens == 0:
        return [(NO_TOKEN, FinishReason.LENGTH)]
    tokens, out = list(admit.prompt), []
    while not out or out[-1][1] is None:
        tokens.append(next_token(tokens))
        finish = None
        if len(out) + 1 == admit.sampling.max_tokens or len(tokens) == max_model_len:
            finish = FinishReason.LENGTH
        allowed = len(out) + 1 >= admit.sampling.min_tokens
        if allowed and tokens[-1] in admit.sampling.stop_token_ids:
            finish = FinishReason.STOP
        out.append((tokens[-1], finish))
    return out


Cell = tuple[int, int, bool]  # position, hash of salt and all tokens up to it, long regime


@dataclass
class Known:
    slot: int
    tokens: list[int]
    continues: bool
    salt: str
    table: list[int] = field(default_factory=list)
    contents: list[int] = field(default_factory=list)

    def cells(self, positions: range, is_long: bool) -> list[Cell]:
        """What must have been written at these positions."""
        for token in self.tokens[len(self.contents) :]:
            before = self.contents[-1] if self.contents else self.salt
            self.contents.append(hash((before, token)))
        return [(p, self.contents[p], is_long) for p in positions]


class SimulatedStages:
    """An Executor: KV memory and state slots hold of which content a position was written.

    Tables and states change at submit, as every stage takes plans in their order; tokens are
    computed when polled, in any order among those in flight. With lookahead all of it happens when
    polled, in order.
    """

    def __init__(self, limits: EngineLimits, random: Random) -> None:
        self.limits = limits
        self.random = random
        self.known: dict[int, Known] = {}
        self.memory: dict[tuple[int, int], Cell] = {}
        self.states: dict[int, list[Cell]] = {}
        self.salts: dict[int, str] = {}
        self.steps: list[StepPlan] = []
        self.num_steps = 0
        self.num_last_sampled = 0

    @property
    def max_in_flight(self) -> int:
        return self.limits.num_steps

    def submit(self, plan: StepPlan) -> None:
        limits = self.limits
        self.num_steps += 1
        flying = {row.seq_id for other in self.steps for row in other.scheduled}
        rows = [row.seq_id for row in plan.scheduled]
        assert len(set(rows)) == len(rows) > 0
        assert not flying & set(plan.released), "a sequence in flight was released"
        assert limits.lookahead or not flying & set(rows), "a sequence is in two steps"
        self.steps.append(plan)
        assert len(self.steps) <= limits.num_steps
        if not limits.lookahead:
            self._prepare(plan)

    def _prepare(self, plan: StepPlan) -> None:
        limits = self.limits
        rows = [row.seq_id for row in plan.scheduled]
        assert sum(row.num_tokens for row in plan.scheduled) <= limits.max_num_batched_tokens
        assert all(row.num_tokens >= 1 for row in plan.scheduled)
        assert len(set(plan.released)) == len(plan.released)
        for seq_id in plan.released:
            del self.known[seq_id]  # KeyError: released without being known
        for new in plan.new:
            assert new.seq_id not in self.known
            assert new.seq_id in rows
            slots = [known.slot for known in self.known.values()]
            assert new.state_slot not in slots if limits.num_state_slots else new.state_slot == -1
            continues = new.sampling.max_tokens > 0
            self.known[new.seq_id] = Known(
                new.state_slot, [*new.prompt, *new.emitted], continues, self.salts[new.seq_id]
            )
        assert len(self.known) <= limits.max_num_seqs
        for op in plan.state_ops:
            self._apply(op)
        for row in plan.scheduled:
            blocks = [block for block in row.new_blocks if block != NO_BLOCK]
            assert len(blocks) == len(row.new_blocks) or limits.window is not None
            assert len(set(blocks)) == len(blocks)
            assert all(0 <= block < limits.num_blocks for block in blocks)
            self.known[row.seq_id].table.extend(row.new_blocks)

    def poll(self, timeout: float | None) -> StepResult | None:
        if not self.steps:
            return None
        if self.limits.lookahead:  # one stage: it takes the next plan when it is done
            plan = self.steps.pop(0)
            self._prepare(plan)
        else:
            plan = self.steps.pop(self.random.randrange(len(self.steps)))
        sampled = []
        for row in plan.scheduled:
            known = self.known[row.seq_id]
            is_long = row.length > (self.limits.reprefill_length or row.length)
            end = row.start + row.num_tokens
            assert row.length == len(known.tokens)
            if row.token_ids == (LAST_SAMPLED,):
                self.num_last_sampled += 1
            else:
                assert list(row.token_ids) == known.tokens[row.start : end]
            assert len(row.token_ids) == row.num_tokens
            written = range(row.start, end)
            for position, cell in zip(written, known.cells(written, is_long), strict=True):
                self.memory[self._place(known, position)] = cell
            if known.slot >= 0:
                self.states[known.slot] += known.cells(written, is_long)
                whole = known.cells(range(end), is_long)
                assert self.states[known.slot] == whole, "the state skipped or mixed"
            read = range(max(0, row.start + 1 - (self.limits.window or end)), end)
            found = [self.memory[self._place(known, position)] for position in read]
            assert found == known.cells(read, is_long), "another content"
            assert row.samples == (known.continues and end == row.length)
            if row.samples:
                token = next_token(known.tokens)
                known.tokens.append(token)
                sampled.append(Sampled(seq_id=row.seq_id, token_id=token, logprob=-float(token)))
        return StepResult(epoch=plan.epoch, step_id=plan.step_id, sampled=tuple(sampled))

    def _apply(self, op: StateOp) -> None:
        limits = self.limits
        slots = {known.slot for known in self.known.values()}
        if op.kind is StateOpKind.SNAPSHOT:
            assert (
                limits.num_state_slots <= op.target < limits.num_state_slots + limits.num_snapshots
            )
            self.states[op.target] = list(self.states[op.source])
            return
        assert op.target in slots, "a state is prepared for nobody"
        assert op.target < limits.num_state_slots
        if op.kind is StateOpKind.COPY:
            assert op.source >= limits.num_state_slots
            self.states[op.target] = list(self.states[op.source])
        else:
            self.states[op.target] = []

    def _place(self, known: Known, position: int) -> tuple[int, int]:
        index, offset = divmod(position, self.limits.block_size)
        assert known.table[index] != NO_BLOCK, "a block behind the window is used"
        return known.table[index], offset


class Ingress:
    """Drives a core and keeps the journal: exactly the tokens it was sent, in order."""

    def __init__(self, limits: EngineLimits, random: Random) -> None:
        self.core = EngineCore(limits)
        self.random = random
        self.stages = SimulatedStages(limits, random)
        self.journal: dict[int, list[Token]] = {}
        self.open: dict[int, Admit] = {}
        self.ended: dict[int, int] = {}

    def admit(self, admit: Admit) -> None:
        self.stages.salts[admit.seq_id] = admit.cache_salt
        assert self.core.admit(admit) is None
        self.core.check_invariants()
        self.journal.setdefault(admit.seq_id, [])
        self.open[admit.seq_id] = admit

    def abort(self, seq_id: int) -> None:
        self.core.abort(seq_id)
        self.core.check_invariants()
        del self.open[seq_id], self.journal[seq_id]

    def step(self) -> None:
        executor: Executor = self.stages
        while (plan := self.core.schedule()) is not None:
            self.core.check_invariants()
            executor.submit(plan)
            if self.random.random() < 0.2:
                break
        assert self.core.num_in_flight == len(self.stages.steps)
        assert self.core.num_in_flight or not self.core.has_work, "work is left and none is done"
        result = executor.poll(0)
        computed = [] if result is None else self.core.apply(result)
        for token in computed:
            if token.token_id == NO_TOKEN:
                known = self.stages.known[token.seq_id]
                assert len(known.contents) == len(known.tokens), "it ends before its last row"
            assert token.position == len(self.journal[token.seq_id])
            assert self.journal[token.seq_id][-1:] == [] or token.seq_id in self.open
            self.journal[token.seq_id].append(token)
            if token.finish is not None:
                del self.open[token.seq_id]
                self.ended[token.seq_id] = self.stages.num_steps
        self.core.check_invariants()

    def crash(self, *, keep_cache: bool = False) -> None:
        """Everything but the journal is lost, or all but the stages' memory; what was in flight
        arrives too late."""
        late = [self.stages.poll(0) for _ in self.stages.steps[:1]]
        self.core.reset(self.core.epoch + 1, keep_cache=keep_cache)
        before = self.stages
        self.stages = SimulatedStages(self.core.limits, self.random)
        self.stages.salts = before.salts
        if keep_cache:
            self.stages.memory, self.stages.states = before.memory, before.states
        for result in late:
            assert result is not None
            assert self.core.apply(result) == ()
        for seq_id, admit in list(self.open.items()):
            assert self.core.admit(admit) is None  # of the epoch that is over: dropped
            emitted = tuple(token.token_id for token in self.journal[seq_id])
            again = Admit(
                seq_id=seq_id,
                epoch=self.core.epoch,
                prompt=admit.prompt,
                emitted=emitted,
                sampling=admit.sampling,
                priority=admit.priority,
                cache_salt=admit.cache_salt,
            )
            self.admit(again)
        assert self.core.load().waiting == len(self.open)
