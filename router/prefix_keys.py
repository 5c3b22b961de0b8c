"""Names for content: one key per full block of tokens, that also names everything before it."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b
from struct import pack


class PrefixKeys:
    """The keys of one sequence's full blocks, extended as it grows.

    A key is a hash of the block's tokens and of the key before it (vLLM's block hash chain); the
    first also hashes what else decides the content: `regime` and the caller's `salt`.
    """

    def __init__(self, block_size: int, *, regime: str, salt: str = "") -> None:
        self.regime = regime
        self._block_size = block_size
        self._root = blake2b(f"{regime}\0{salt}".encode(), digest_size=16).digest()
        self._keys: list[bytes] = []

    def up_to(self, tokens: Sequence[int], num_tokens: int) -> list[bytes]:
        """Keys of the blocks that the first `num_tokens` of `tokens` fill."""
        size = self._block_size
        while (len(self._keys) + 1) * size <= num_tokens:
            start = len(self._keys) * size
            before = self._keys[-1] if self._keys else self._root
            block = pack(f"<{size}q", *tokens[start : start + size])
            self._keys.append(blake2b(before + block, digest_size=16).digest())
        return self._keys[: num_tokens // size]
