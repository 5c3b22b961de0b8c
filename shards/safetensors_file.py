"""One safetensors file: where its tensors lie, and their bytes read into memory of one's own.

Plain reads, not a mapping: pages of a mapped file count as the reader's memory for as long as the
mapping lives, and a file that changes underneath would change weights or crash the process.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_LENGTH_BYTES = 8
"""The header's length comes first, little-endian."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """A tensor's `shape`, the format's name of its `dtype`, and its bytes in `file`."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    """From the beginning of the file."""
    num_bytes: int


def read_header(file: Path) -> dict[str, StoredTensor]:
    """Tensors by name, all within the file. Raises SafetensorError or OSError."""
    with file.open("rb") as opened:
        # The library refuses what does not add up: offsets, shapes and dtypes, the file's length.
        # It calls every file that it cannot open a missing one: opened above, to hear the reason.
        with safe_open(file, framework="numpy"):
            pass
        length = int.from_bytes(opened.read(_LENGTH_BYTES), "little")
        header = json.loads(opened.read(length))
    data = _LENGTH_BYTES + length
    return {
        name: StoredTensor(
            file=file,
            dtype=entry["dtype"],
            shape=tuple(entry["shape"]),
            offset=data + entry["data_offsets"][0],
            num_bytes=entry["data_offsets"][1] - entry["data_offsets"][0],
        )
        for name, entry in header.items()
        if name != "__metadata__"
    }


@contextmanager
def opened(file: Path) -> Iterator[int]:
    """A descriptor for `read_exactly`. Raises OSError."""
    descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def will_need(descriptor: int, offset: int, num_bytes: int) -> None:
    """Have the system begin to read some bytes, and return at once."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, offset, num_bytes, os.POSIX_FADV_WILLNEED)


def read_exactly(descriptor: int, offset: int, target: memoryview) -> None:
    """Fill `target` with the file's bytes from `offset` on. Raises OSError, or EOFError."""
    while target:
        # One call moves 2 GiB at most, and may move less.
        count = os.preadv(descriptor, [target], offset)
        if not count:
            raise EOFError(f"the file ends at byte {offset}")
        target, offset = target[count:], offset + count
