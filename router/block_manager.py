"""Which KV blocks are free, who holds the others, and which content is worth finding again."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Mapping, Sequence

NO_BLOCK = -1
"""In the place of a block that lies behind a sliding window."""


class BlockManager:
    """Hands out KV blocks of `block_size` token positions; full ones can be found by their key.

    A block that nobody holds keeps its content until it is handed out again. Blocks are freed one
    by one and handed out in order of release: least recently used first.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self._holders = [0] * num_blocks
        self._key_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds."""
        return len(self._free)

    @property
    def num_used(self) -> int:
        """Blocks with at least one holder."""
        return self.num_blocks - len(self._free)

    @property
    def num_cached(self) -> int:
        """Blocks whose content can be found."""
        return len(self._key_of)

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens` positions."""
        return -(-num_tokens // self.block_size)

    def allocate(self, num: int) -> list[int]:
        """`num` blocks with one holder each. Raises MemoryError when fewer are free."""
        if num > len(self._free):
            raise MemoryError(
                f"{num} KV blocks wanted, {len(self._free)} of {self.num_blocks} free"
            )
        blocks = [self._free.popitem(last=False)[0] for _ in range(num)]
        for block in blocks:
            self._holders[block] = 1
            self.forget(block)
        return blocks

    def publish(self, block: int, key: bytes) -> None:
        """A held block's content is complete and final; a key that is known stays where it is."""
        assert self._holders[block], f"KV block {block} is published without a holder"
        if key not in self._block_of and block not in self._key_of:
            self._key_of[block] = key
            self._block_of[key] = block

    def forget(self, block: int) -> None:
        """A block's content may not be found any more."""
        if block in self._key_of:
            del self._block_of[self._key_of.pop(block)]

    def find(self, keys: Sequence[bytes], reach: int | None = None) -> list[int]:
        """Blocks of a beginning of `keys`, as long as can be, whose content is here.

        With `reach` only that many blocks before its end are needed, and those further back are
        NO_BLOCK.
        """
        found: list[int] = []
        run = usable = 0
        for key in keys:
            block = self._block_of.get(key, NO_BLOCK)
            if block == NO_BLOCK and reach is None:
                break
            found.append(block)
            run = run + 1 if block != NO_BLOCK else 0
            if run >= min(len(found), len(keys) if reach is None else reach):
                usable = len(found)
        needed = usable if reach is None else min(reach, usable)
        return [NO_BLOCK] * (usable - needed) + found[usable - needed : usable]

    def is_free(self, block: int) -> bool:
        """Whether nobody holds the block."""
        return block in self._free

    def idle_after(self, holds: Mapping[int, int]) -> set[int]:
        """The blocks that giving up these holds (per block) would free."""
        return {block for block, count in holds.items() if self._holders[block] == count}

    def hold(self, blocks: Iterable[int]) -> None:
        """One more holder for each of some found blocks."""
        for block in blocks:
            self._holders[block] += 1
            self._free.pop(block, None)

    def free(self, blocks: Iterable[int]) -> None:
        """Give up one hold on each block. Raises ValueError for a block nobody holds."""
        for block in blocks:
            if not self._holders[block]:
                raise ValueError(f"KV block {block} is freed twice")
            self._holders[block] -= 1
            if not self._holders[block]:
                self._free[block] = None

    def check_invariants(self, held: Iterable[int] | None = None) -> None:
        """Free and held blocks are disjoint and together all; keys and blocks are one to one.

        `held`, where given, lists every block once per holder.
        """
        free = set(self._free)
        holders = {block: count for block, count in enumerate(self._holders) if count}
        assert min(self._holders, default=0) >= 0, "negative number of holders"
        assert not free & holders.keys(), "a block is free and held"
        assert free | holders.keys() == set(range(self.num_blocks)), "a block is lost"
        assert {key: block for block, key in self._key_of.items()} == self._block_of
        if held is not None:
            assert Counter(held) == holders, "blocks leak or are held by nobody"
