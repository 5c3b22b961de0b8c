"""Weights on their way into the page cache while Ray starts and PyTorch is imported."""

from __future__ import annotations

import logging
import threading
from pathlib import Path

from shards.memory import free_bytes
from shards.safetensors_file import opened, will_need

log = logging.getLogger("conclave.loading")

_STEP_BYTES = 8 << 20
"""Asked for at once; where the disk has enough to do, the system makes the thread wait."""


def begin_prefetch(folder: Path, most: int | None = None) -> threading.Thread:
    """Have the system read a folder's weights, at most `most` bytes, on a thread of its own.

    By default half of the free memory: what is read before it is wanted must not push out what
    is. Only a hint: whatever goes wrong, the weights are read when they are wanted.
    """
    thread = threading.Thread(
        target=_prefetch, args=(folder, most), name="conclave-prefetch", daemon=True
    )
    thread.start()
    return thread


def _prefetch(folder: Path, most: int | None) -> None:
    try:
        left = free_bytes() // 2 if most is None else most
        for file in sorted(folder.glob("*.safetensors")):
            size = file.stat().st_size
            with opened(file) as descriptor:
                for offset in range(0, min(size, left), _STEP_BYTES):
                    will_need(descriptor, offset, min(_STEP_BYTES, left - offset))
            left -= min(size, left)
    except (OSError, ValueError) as error:
        log.info("%s: weights are not read ahead: %s", folder, error)
