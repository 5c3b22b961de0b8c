"""Which KV blocks are free, and how many sequences hold each of the others."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable


class BlockManager:
    """Hands out KV blocks of `block_size` token positions.

    Blocks are freed one by one, not by sequence, and the free queue is in order of release, so
    that it is also the eviction order of blocks whose content is still worth keeping.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._free: deque[int] = deque(range(num_blocks))
        self._holders = [0] * num_blocks

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds."""
        return len(self._free)

    @property
    def num_used(self) -> int:
        """Blocks with at least one holder."""
        return self.num_blocks - len(self._free)

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens` positions."""
        return -(-num_tokens // self.block_size)

    def allocate(self, num: int) -> list[int]:
        """`num` blocks with one holder each. Raises MemoryError when fewer are free."""
        if num > len(self._free):
            raise MemoryError(
                f"{num} KV blocks wanted, {len(self._free)} of {self.num_blocks} free"
            )
        blocks = [self._free.popleft() for _ in range(num)]
        for block in blocks:
            self._holders[block] = 1
        return blocks

    def free(self, blocks: Iterable[int]) -> None:
        """Give up one hold on each block. Raises ValueError for a block nobody holds."""
        for block in blocks:
            if not self._holders[block]:
                raise ValueError(f"KV block {block} is freed twice")
            self._holders[block] -= 1
            if not self._holders[block]:
                self._free.append(block)

    def check_invariants(self) -> None:
        """Free and held blocks are disjoint and together all of them."""
        free = set(self._free)
        assert len(free) == len(self._free), "a block is twice in the free queue"
        held = {block for block, holders in enumerate(self._holders) if holders > 0}
        assert min(self._holders, default=0) >= 0, "negative number of holders"
        assert not free & held, f"blocks {sorted(free & held)} are free and held"
        assert free | held == set(range(self.num_blocks)), "a block is lost"
