"""Threads that read weights side by side, so that the disk always has something to do."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from types import TracebackType

import torch
from torch import Tensor

from models.interface import TensorSlice
from shards.checkpoint import Checkpoint, Run
from shards.pages import Arena

NUM_READERS = 4
"""They wait most of the time: a disk answers several requests sooner than one after the other."""
_RUN_BYTES = 8 << 20
"""One thread reads so much in a row."""


class Readers:
    """`with Readers(checkpoint) as readers:` places tensors; when it ends they have been read.

    Each thread needs a small buffer, no more: bytes go from the file to where they stay.
    """

    def __init__(self, checkpoint: Checkpoint, num_threads: int = NUM_READERS) -> None:
        self._checkpoint = checkpoint
        self._num_threads = num_threads
        self._runs: list[Run] = []

    def read(
        self,
        wanted: TensorSlice,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        arena: Arena | None = None,
    ) -> Tensor:
        """As `Checkpoint.read`; without content until the block has ended. Raises CheckpointError.

        Memory is placed in the order of the calls, whoever reads what into it.
        """
        owned, runs = self._checkpoint.place(wanted, dtype, device, arena)
        self._runs.extend(runs)
        return owned

    def __enter__(self) -> Readers:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Read everything, in the order of the files. Raises CheckpointError."""
        runs, self._runs = self._runs, []
        if error is not None:
            return
        pieces = [piece for run in runs for piece in run.split(_RUN_BYTES)]
        pieces.sort(key=lambda piece: (piece.file, piece.offset))
        with ThreadPoolExecutor(self._num_threads, "conclave-reader") as pool:
            reads = [pool.submit(self._checkpoint.fill, piece) for piece in pieces]
            try:
                for read in reads:
                    read.result()
            finally:
                pool.shutdown(cancel_futures=True)
