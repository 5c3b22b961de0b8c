"""A stage that knows of every KV position and every state which tokens went into it."""

from __future__ import annotations

from dataclasses import dataclass, field

from router.block_manager import NO_BLOCK
from router.limits import EngineLimits
from router.sequence import Sequence
from router.step import ScheduledSequence, StateOp

Content = tuple[str, bool, tuple[int, ...]]
"""Salt, LongRoPE regime, and all the tokens that went in."""


@dataclass
class Plan:
    """A step on its way: it runs after those before it, at the latest when its result is seen."""

    ops: tuple[StateOp, ...]
    rows: list[tuple[Sequence, ScheduledSequence]]
    has_run: bool = False


@dataclass
class Memory:
    """What a stage does with plans, in their order, and what it then holds."""

    limits: EngineLimits
    cells: dict[tuple[int, int], Content] = field(default_factory=dict)
    states: dict[int, Content | None] = field(default_factory=dict)
    tables: dict[int, list[int]] = field(default_factory=dict)

    def content(self, seq: Sequence, num_tokens: int) -> Content:
        limit = self.limits.reprefill_length
        is_long = limit is not None and seq.length > limit
        return seq.cache_salt, is_long, tuple(seq.tokens[:num_tokens])

    def block(self, block: int) -> list[Content | None]:
        return [self.cells.get((block, offset)) for offset in range(self.limits.block_size)]

    def run(self, plan: Plan) -> None:
        for op in plan.ops:
            self.states[op.target] = self.states[op.source] if op.source >= 0 else None
        for seq, row in plan.rows:
            table = self.tables[seq.seq_id]
            table.extend(row.new_blocks)
            end = row.start + row.num_tokens
            window = self.limits.window or end
            for position in range(row.start, end):
                self.cells[self._place(table, position)] = self.content(seq, position + 1)
            for position in range(max(0, row.start + 1 - window), end):
                found = self.cells[self._place(table, position)]
                assert found == self.content(seq, position + 1), "another content is read"
            if seq.slot >= 0:
                expected = self.content(seq, row.start) if row.start else None
                assert self.states[seq.slot] == expected, "another state is continued"
                self.states[seq.slot] = self.content(seq, end)
        plan.has_run = True

    def _place(self, table: list[int], position: int) -> tuple[int, int]:
        index, offset = divmod(position, self.limits.block_size)
        assert table[index] != NO_BLOCK, "a block behind the window is used"
        return table[index], offset
