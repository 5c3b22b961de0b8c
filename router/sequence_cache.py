"""What sequences hold, KV blocks and a state slot, and what others may find of it later."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from router.block_manager import NO_BLOCK, BlockManager
from router.limits import EngineLimits
from router.prefix_keys import PrefixKeys
from router.sequence import Sequence
from router.snapshots import Snapshots
from router.state_slots import StateSlots
from router.step import NOTHING, StateOp, StateOpKind

MAX_MARKS = 4
"""How many stops for a snapshot others may ask of one prefill: each cuts a chunk short."""


@dataclass(frozen=True, slots=True)
class Match:
    """What is there of a sequence before it starts.

    `blocks` have the content of its beginning. The first `num_tokens` tokens need not be computed:
    all of those blocks, or for recurrent models up to the last position with a snapshot.
    """

    blocks: tuple[int, ...] = ()
    num_tokens: int = 0


class SequenceCache:
    """Owns KV blocks, state slots and snapshots; no I/O. Its operations go out with `take_ops`.

    Blocks of a common beginning are shared. Where a recurrent model must compute tokens of shared
    blocks again it writes the bits that are there.
    """

    def __init__(self, limits: EngineLimits) -> None:
        self._limits = limits
        self.blocks = BlockManager(limits.num_blocks, limits.block_size)
        self.slots = StateSlots(limits.num_state_slots)
        num_snapshots = limits.num_snapshots if limits.num_state_slots else 0
        self.snapshots = Snapshots(limits.num_state_slots, num_snapshots)
        self._ops: list[StateOp] = []
        self._coming: dict[bytes, Sequence] = {}
        """Keys of blocks that a running sequence is about to publish."""

    @property
    def _recurrent(self) -> bool:
        return self._limits.num_state_slots > 0

    @property
    def _reach(self) -> int | None:
        """Blocks before a block boundary that the next token reads; None for all.

        A recurrent sequence may start further back than its blocks, and write them again.
        """
        window = self._limits.window
        if window is None or self._recurrent:
            return None
        return max(1, self.blocks.blocks_for(window - 1))

    def match(self, seq: Sequence) -> Match:
        """What is there for a waiting sequence; at least its last token is left to compute."""
        keys = self._keys(seq, seq.length - 1)
        # Whoever wants arrays wants them of every position.
        if not keys or seq.want != NOTHING:
            return Match()
        found = tuple(self.blocks.find(keys, self._reach))
        if not self._recurrent:
            return Match(found, len(found) * self._limits.block_size)
        reach = range(len(found), 0, -1)
        usable = next((i for i in reach if keys[i - 1] in self.snapshots), 0)
        return Match(found, usable * self._limits.block_size)

    def awaits(self, seq: Sequence, match: Match) -> bool:
        """Whether a running sequence is about to publish more of what `seq` begins with.

        A recurrent one is asked for a snapshot where the two part.
        """
        keys = self._keys(seq, seq.length - 1)
        first = len(match.blocks)
        if seq.want != NOTHING or first >= len(keys) or keys[first] not in self._coming:
            return False
        other, parts_at = self._coming[keys[first]], first
        while parts_at < len(keys) and self._coming.get(keys[parts_at]) is other:
            parts_at += 1
        if len(other.marks) < MAX_MARKS:
            self._mark(other, parts_at * self._limits.block_size)
        return True

    def fits(self, seq: Sequence, match: Match, *, spare: int, without: Iterable[Sequence]) -> bool:
        """Whether `seq` could start and leave `spare` blocks free, if others held nothing."""
        held = Counter(b for other in without for b in other.blocks if b != NO_BLOCK)
        idle = self.blocks.idle_after(held)
        missing = self.blocks.blocks_for(seq.length) - len(match.blocks)
        # Holding a found block that nobody holds takes it from the free ones.
        needed = missing + sum(self.blocks.is_free(b) or b in idle for b in match.blocks)
        return needed + spare <= self.blocks.num_free + len(idle)

    def start(self, seq: Sequence, match: Match) -> None:
        """Give a waiting sequence blocks for all its tokens, and a slot with its state."""
        size = self._limits.block_size
        self.blocks.hold(block for block in match.blocks if block != NO_BLOCK)
        missing = self.blocks.blocks_for(seq.length) - len(match.blocks)
        seq.blocks = [*match.blocks, *self.blocks.allocate(missing)]
        seq.num_computed, seq.start_length = match.num_tokens, seq.length
        seq.num_published = len(match.blocks)
        keys = self._keys(seq, seq.length)
        for key in keys[seq.num_published :] if seq.publishes else ():
            self._coming.setdefault(key, seq)
        if not self._recurrent:
            return
        seq.slot = self.slots.allocate()
        if match.num_tokens:
            source = self.snapshots.use(keys[match.num_tokens // size - 1])
            self._ops.append(StateOp(kind=StateOpKind.COPY, target=seq.slot, source=source))
        else:
            self._ops.append(StateOp(kind=StateOpKind.ZERO, target=seq.slot))
        # Where it parts from what was there before, and where the same prompt would be resumed.
        self._mark(seq, len(match.blocks) * size)
        self._mark(seq, (seq.length - 1) // size * size)

    def chunk(self, seq: Sequence, num_tokens: int) -> int:
        """`num_tokens` of the next chunk, cut so that it ends where a snapshot is wanted."""
        ahead = (mark - seq.num_planned for mark in seq.marks if mark > seq.num_planned)
        return min([num_tokens, *ahead])

    def missing_blocks(self, seq: Sequence) -> int:
        """Blocks that a running sequence's newest tokens need beyond those it holds."""
        return max(0, -(-seq.planned_length // self._limits.block_size) - len(seq.blocks))

    def grow(self, seq: Sequence) -> bool:
        """Add the blocks of a running sequence's newest tokens; False when too few are free."""
        missing = self.missing_blocks(seq)
        if missing > self.blocks.num_free:
            return False
        if missing:
            seq.blocks += self.blocks.allocate(missing)
        return True

    def computed(self, seq: Sequence, num_tokens: int) -> None:
        """A step has computed the next tokens: full blocks can be found from now on."""
        seq.num_computed += num_tokens
        known = min(seq.num_computed, len(seq.tokens))
        if seq.publishes and known // self._limits.block_size > seq.num_published:
            self._publish(seq, self._keys(seq, known))
        if self._limits.window is not None:
            self._drop_behind_window(seq, self._limits.window)
        at_boundary = not seq.num_computed % self._limits.block_size
        if at_boundary and self.snapshots.num_slots and not seq.num_in_flight:
            self.keep_state(seq)

    def _publish(self, seq: Sequence, keys: list[bytes]) -> None:
        for index in range(seq.num_published, len(keys)):
            self.blocks.publish(seq.blocks[index], keys[index])
            self._forget_coming(seq, keys[index])
        seq.num_published = max(seq.num_published, len(keys))

    def keep_state(self, seq: Sequence) -> None:
        """Copy the state of a sequence before its next row, if it is worth it.

        At a block boundary others can find it: where one asked for it, and behind every prefill.
        """
        position = seq.num_planned
        if (
            not seq.publishes
            or not self.snapshots.num_slots
            or not position
            or position % self._limits.block_size
        ):
            return
        wanted = position in seq.marks
        seq.marks.discard(position)
        # Tokens of an ended sequence that nobody has seen have no name.
        if position > seq.length or not (wanted or position >= seq.start_length):
            return
        keys = self._keys(seq, position)
        if not keys or keys[-1] in self.snapshots:
            return
        slot = self.snapshots.take(keys[-1], instead_of=None if wanted else seq.rolling)
        self._ops.append(StateOp(kind=StateOpKind.SNAPSHOT, target=slot, source=seq.slot))
        if not wanted:
            seq.rolling = keys[-1]

    def distrust(self, seq: Sequence) -> None:
        """What a sequence has published may not be found: its numbers are not finite.

        A kernel may have spread that to tokens a little before the one that it came with.
        """
        seq.publishes = False
        for block in seq.blocks:
            self.blocks.forget(block)
        for key in self._keys(seq, seq.length):
            self.snapshots.forget(key)

    def forget_all(self, running: Iterable[Sequence], lost: Iterable[StateOp]) -> None:
        """No sequence is known any more and the operations in `lost` may never have been done;
        what is published is still there."""
        for seq in running:
            self.vacate(seq)
        for op in (*lost, *self.take_ops()):
            if op.kind is StateOpKind.SNAPSHOT:
                self.snapshots.discard(op.target)

    def vacate(self, seq: Sequence) -> None:
        """Take everything back; what is published stays findable until it is needed."""
        for key in self._keys(seq, seq.length)[seq.num_published :]:
            self._forget_coming(seq, key)
        # Last block first: the head of a prefix outlives its tail in the free queue.
        self.blocks.free(block for block in reversed(seq.blocks) if block != NO_BLOCK)
        if seq.slot >= 0:
            self.slots.free(seq.slot)
        seq.blocks, seq.num_sent_blocks, seq.slot, seq.num_computed = [], 0, -1, 0
        seq.num_published, seq.num_dropped, seq.rolling, seq.start_length = 0, 0, None, 0
        seq.marks.clear()

    def _drop_behind_window(self, seq: Sequence, window: int) -> None:
        """Give up the blocks that no later token of a sequence reads."""
        first_read = max(0, seq.num_computed - window + 1)
        for index in range(seq.num_dropped, first_read // self._limits.block_size):
            if seq.blocks[index] != NO_BLOCK:
                self.blocks.free([seq.blocks[index]])
                seq.blocks[index] = NO_BLOCK
            seq.num_dropped = index + 1

    def take_ops(self) -> tuple[StateOp, ...]:
        """State operations of the plan that goes out now, in their order.

        A state is copied before its sequence's next row and before its slot is prepared for
        another one, and a snapshot is written before it is read.
        """
        ops, self._ops = tuple(self._ops), []
        return ops

    def _keys(self, seq: Sequence, num_tokens: int) -> list[bytes]:
        if not self._limits.prefix_caching:
            return []
        limit = self._limits.reprefill_length
        # A running sequence stays in the regime that it started in: at the crossing it restarts.
        length = seq.start_length or seq.length
        regime = "long" if limit is not None and length > limit else "short"
        if seq.keys is None or seq.keys.regime != regime:
            seq.keys = PrefixKeys(self._limits.block_size, regime=regime, salt=seq.cache_salt)
        return seq.keys.up_to(seq.tokens, num_tokens)

    def _mark(self, seq: Sequence, position: int) -> None:
        if seq.publishes and self.snapshots.num_slots and position > seq.num_computed:
            seq.marks.add(position)

    def _forget_coming(self, seq: Sequence, key: bytes) -> None:
        if self._coming.get(key) is seq:
            del self._coming[key]

    def check_invariants(self, running: Iterable[Sequence]) -> None:
        """Every hold and slot belongs to a running sequence, and none is missing."""
        sequences = list(running)
        held = [[block for block in seq.blocks if block != NO_BLOCK] for seq in sequences]
        self.blocks.check_invariants([block for blocks in held for block in blocks])
        self.slots.check_invariants()
        self.snapshots.check_invariants()
        slots = [seq.slot for seq in sequences if seq.slot >= 0]
        assert len(slots) == len(set(slots)) == self.slots.num_used, "slots leak or are shared"
        assert all(any(other is seq for seq in sequences) for other in self._coming.values())
        for seq, blocks in zip(sequences, held, strict=True):
            assert (seq.slot >= 0) == self._recurrent
            assert len(blocks) == len(set(blocks)), "a sequence holds a block twice"
            assert seq.num_computed <= len(seq.blocks) * self._limits.block_size
            assert seq.num_sent_blocks <= len(seq.blocks)
