"""What is derived from a batch once and used by every layer of a stage."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

from models.interface import BatchMeta

T = TypeVar("T")

# Two micro-batches alternate inside one step.
_REMEMBERED = 2


class BatchMemo(Generic[T]):
    """Remembers the last two results of `derive(meta, key)`, by the identity of `meta`.

    A pure cache: a `BatchMeta` is never changed after it was built.
    """

    def __init__(self, derive: Callable[[BatchMeta, int], T]) -> None:
        self._derive = derive
        self._recent: list[tuple[BatchMeta, int, T]] = []

    def __call__(self, meta: BatchMeta, key: int = 0) -> T:
        """The value derived from `meta` and `key`."""
        for known, known_key, value in self._recent:
            if known is meta and known_key == key:
                return value
        value = self._derive(meta, key)
        self._recent = [*self._recent[1 - _REMEMBERED :], (meta, key, value)]
        return value
