"""A stage that knows of every KV position and every state which tokens went into it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from zlib import crc32

from router.block_manager import NO_BLOCK
from router.limits import EngineLimits
from router.prefix_keys import PrefixKeys
from router.sequence import Sequence
from router.step import LAST_SAMPLED, ScheduledSequence, StateOp

Content = tuple[str, bool, tuple[int, ...]]
"""Salt, LongRoPE regime, and all the tokens that went in."""


@dataclass
class Plan:
    """A step on its way: it runs after those before it, at the latest when its result is seen."""

    ops: tuple[StateOp, ...]
    rows: list[tuple[Sequence, ScheduledSequence]]
    has_run: bool = False
    sampled: dict[int, int] = field(default_factory=dict)


@dataclass
class Known:
    """A sequence as the stage was told of it, and what it has sampled since."""

    salt: str
    is_long: bool
    tokens: list[int]
    table: list[int] = field(default_factory=list)

    def content(self, num_tokens: int) -> Content:
        assert num_tokens <= len(self.tokens)
        return self.salt, self.is_long, tuple(self.tokens[:num_tokens])


@dataclass
class Memory:
    """What a stage does with plans, in their order, and what it then holds."""

    limits: EngineLimits
    known: dict[int, Known] = field(default_factory=dict)
    cells: dict[tuple[int, int], Content] = field(default_factory=dict)
    states: dict[int, Content | None] = field(default_factory=dict)

    def is_long(self, length: int) -> bool:
        return self.limits.reprefill_length is not None and length > self.limits.reprefill_length

    def introduce(self, seq: Sequence) -> None:
        known = Known(seq.cache_salt, self.is_long(seq.length), seq.tokens.copy())
        self.known[seq.seq_id] = known

    def keys(self, content: Content) -> list[bytes]:
        """The names of what its full blocks hold."""
        salt, is_long, tokens = content
        regime = "long" if is_long else "short"
        keys = PrefixKeys(self.limits.block_size, regime=regime, salt=salt)
        return keys.up_to(tokens, len(tokens))

    def block(self, block: int) -> list[Content | None]:
        return [self.cells.get((block, offset)) for offset in range(self.limits.block_size)]

    def run(self, plan: Plan) -> None:
        for op in plan.ops:
            self.states[op.target] = self.states[op.source] if op.source >= 0 else None
        for seq, row in plan.rows:
            known = self.known[seq.seq_id]
            known.table.extend(row.new_blocks)
            end = row.start + row.num_tokens
            assert self.is_long(row.length) == known.is_long, "the regime changed on the way"
            if row.token_ids != (LAST_SAMPLED,):
                assert list(row.token_ids) == known.tokens[row.start : end]
            self._compute(known, range(row.start, end))
            if seq.slot >= 0:
                expected = known.content(row.start) if row.start else None
                assert self.states[seq.slot] == expected, "another state is continued"
                self.states[seq.slot] = known.content(end)
            if row.samples:
                assert end == row.length == len(known.tokens)
                plan.sampled[seq.seq_id] = crc32(bytes(known.tokens)) % 3
                known.tokens.append(plan.sampled[seq.seq_id])
        plan.has_run = True

    def _compute(self, known: Known, positions: range) -> None:
        """Write these positions, and read what they attend to."""
        for position in positions:
            self.cells[self._place(known, position)] = known.content(position + 1)
        reach = self.limits.window or positions.stop
        for position in range(max(0, positions.start + 1 - reach), positions.stop):
            found = self.cells[self._place(known, position)]
            assert found == known.content(position + 1), "another content is read"

    def _place(self, known: Known, position: int) -> tuple[int, int]:
        index, offset = divmod(position, self.limits.block_size)
        assert known.table[index] != NO_BLOCK, "a block behind the window is used"
        return known.table[index], offset


@dataclass
class Findable:
    """What each published block holds until it is handed out again; one block for each content."""

    limits: EngineLimits
    holds: dict[int, Content] = field(default_factory=dict)

    def publish(self, block: int, content: Content) -> None:
        known = block in self.holds or content in self.holds.values()
        if self.limits.prefix_caching and not known:
            self.holds[block] = content

    def forget(self, blocks: list[int]) -> None:
        for block in blocks:
            self.holds.pop(block, None)

    def longest(self, num_tokens: int, content: Callable[[int], Content]) -> tuple[int, ...]:
        """The blocks of the longest beginning that can be used, by trying all of them."""
        size, limits = self.limits.block_size, self.limits
        block_of = {held: block for block, held in self.holds.items()}
        for num in range(num_tokens // size, 0, -1):
            # The last block is always wanted, and all that the next token reads.
            reads_all = limits.window is None or limits.num_state_slots > 0
            first_read = 0 if reads_all else num * size - (limits.window or 0) + 1
            behind = max(0, min(first_read // size, num - 1))
            needed = [content((i + 1) * size) for i in range(behind, num)]
            if all(one in block_of for one in needed):
                return (NO_BLOCK,) * behind + tuple(block_of[one] for one in needed)
        return ()
