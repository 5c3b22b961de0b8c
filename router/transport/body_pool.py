"""Memory for the bodies of large frames, taken again once nobody holds a view of it."""

from __future__ import annotations

from mmap import mmap

_SPARE = 4
_SPARE_BYTES = 32 << 20
_STEP_BYTES = 64 << 10


class BodyPool:
    """Zeroed fresh pages cost more than receiving into them: a few bodies are kept for the next.

    What is kept never exceeds `_SPARE` bodies of `_SPARE_BYTES`.
    """

    def __init__(self) -> None:
        self._bodies: list[bytearray] = []

    def take(self, num_bytes: int) -> memoryview:
        """`num_bytes` with whatever in them; theirs for as long as any view of them lives."""
        if num_bytes > _SPARE_BYTES:
            # Pages appear as bytes arrive: announcing a gigabyte costs us nothing.
            return memoryview(mmap(-1, num_bytes))
        for body in self._bodies:
            # Much too large a body would be missing when a large frame comes.
            if num_bytes <= len(body) <= 4 * num_bytes and _is_free(body):
                return memoryview(body)[:num_bytes]
        body = bytearray(-(-num_bytes // _STEP_BYTES) * _STEP_BYTES)
        self._keep(body)
        return memoryview(body)[:num_bytes]

    def _keep(self, body: bytearray) -> None:
        if len(self._bodies) == _SPARE:
            # The oldest is the one whose size nobody asked for since, or that somebody holds.
            del self._bodies[0]
        self._bodies.append(body)


def _is_free(body: bytearray) -> bool:
    """Whether no view of it exists: only then does Python let it change its size."""
    try:
        last = body.pop()
    except BufferError:
        return False
    body.append(last)
    return True
