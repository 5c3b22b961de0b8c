"""The bytes of every token, in a form that travels to the process that samples."""

from __future__ import annotations

from array import array
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from itertools import accumulate, pairwise

_UINT32 = "I"


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    """Tokens of ids 0, 1, ... one behind the other; ids without a token have no bytes.

    `lengths` are uint32 of the machine's own byte order, as is everything between workers.
    """

    # A megabyte of them is of no use in a log.
    data: bytes = field(repr=False)
    lengths: bytes = field(repr=False)
    special_ids: tuple[int, ...] = field(repr=False)
    """Rising; these never stand for text."""
    eos_ids: tuple[int, ...]
    """Some of `special_ids`: what ends an answer; none where the checkpoint declares none."""

    @classmethod
    def of(
        cls, tokens: Iterable[bytes], special_ids: Collection[int], eos_ids: tuple[int, ...]
    ) -> Vocabulary:
        """The compact form of `tokens`, in the order of their ids."""
        listed = list(tokens)
        return cls(
            data=b"".join(listed),
            lengths=array(_UINT32, map(len, listed)).tobytes(),
            special_ids=tuple(sorted({*special_ids, *eos_ids})),
            eos_ids=eos_ids,
        )

    def tokens(self) -> list[bytes]:
        """Every token's bytes, by id."""
        lengths = array(_UINT32, self.lengths)
        ends = accumulate(lengths, initial=0)
        return [self.data[start:end] for start, end in pairwise(ends)]
