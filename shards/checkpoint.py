"""Safetensors checkpoints on disk: checked first, then read by the row."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from models.interface import ModelConfig, TensorSlice, TensorSource
from models.registry import load_config
from router.transport.tensors import tensor_buffer
from shards.load_progress import OnRead
from shards.pages import Arena
from shards.safetensors_file import (
    INDEX_FILE,
    SINGLE_FILE,
    StoredTensor,
    opened,
    read_exactly,
    read_header,
    will_need,
)

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
_INT8 = {"I8": torch.int8}
_PIECE_BYTES = 2**20
"""Read at a time: what is converted or transposed stays in the second-level cache."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be served; the message names the file or tensor and the reason."""


@dataclass(frozen=True, slots=True, eq=False)
class Run:
    """Rows of a tensor in memory, and the bytes in a file that belong into them."""

    rows: Tensor
    """Turned if the file has them turned; of the dtype that is wanted, the file's is `dtype`."""
    file: Path
    offset: int
    dtype: torch.dtype
    name: str

    @property
    def row_bytes(self) -> int:
        """Of one row in the file."""
        return math.prod(self.rows.shape[1:]) * self.dtype.itemsize

    @property
    def num_bytes(self) -> int:
        """Of all of them in the file."""
        return len(self.rows) * self.row_bytes

    def split(self, most: int) -> Iterator[Run]:
        """Runs of at most `most` bytes, or of one row."""
        step = max(1, most // max(1, self.row_bytes))
        for start in range(0, len(self.rows), step):
            offset = self.offset + start * self.row_bytes
            yield replace(self, rows=self.rows[start : start + step], offset=offset)


class Checkpoint:
    """A folder with `model.safetensors`, or with its sharded form and index.

    Every header is read and checked against its file's size up front; a tensor's data is read
    only when asked for. Raises CheckpointError.
    """

    def __init__(self, path: Path | str, on_read: OnRead | None = None) -> None:
        self.path = Path(path)
        self.bytes_read = 0
        """Bytes of tensor data read so far."""
        self._on_read = on_read
        self._counting = threading.Lock()
        self._tensors: dict[str, StoredTensor] = {}
        self._count(0)
        for file, listed in self._listed_files().items():
            self._add_file(self.path / file, listed)

    @property
    def names(self) -> frozenset[str]:
        """Every tensor in the files."""
        return frozenset(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape on disk. Raises CheckpointError when there is no such tensor."""
        return self._entry(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """Dtype on disk: a floating-point one, or int8. Raises CheckpointError otherwise."""
        spelling = self._entry(name).dtype
        if spelling in _INT8:
            return _INT8[spelling]
        if spelling not in _DTYPES:
            raise CheckpointError(
                f"{self.path}: tensor {name} has dtype {spelling}; allowed: {', '.join(_DTYPES)}"
            )
        return _DTYPES[spelling]

    def find(self, wanted: TensorSlice) -> TensorSource:
        """The first source of `wanted` that this checkpoint holds. Raises CheckpointError."""
        for source in wanted.sources:
            if source.name in self._tensors:
                return source
        spellings = " or ".join(source.name for source in wanted.sources)
        raise CheckpointError(f"{self.path}: missing tensor {spellings}")

    def num_bytes(self, wanted: TensorSlice) -> int:
        """Bytes that `read` would read. Raises CheckpointError."""
        return sum(
            math.prod(leaf.shape) * self.dtype(self.find(leaf).name).itemsize
            for leaf in wanted.leaves
        )

    def read(
        self,
        wanted: TensorSlice,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        arena: Arena | None = None,
    ) -> Tensor:
        """The wanted rows alone, contiguous, in memory of their own. Raises CheckpointError.

        Takes no more memory than the result and a small buffer; the result comes from `arena`
        where there is one.
        """
        owned, runs = self.place(wanted, dtype, device, arena)
        for run in runs:
            self.fill(run)
        return owned

    def place(
        self,
        wanted: TensorSlice,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        arena: Arena | None = None,
    ) -> tuple[Tensor, list[Run]]:
        """The same, not read yet, and what `fill` must be called with. Raises CheckpointError."""
        empty = torch.empty if arena is None else arena.empty
        owned = empty(wanted.shape, dtype=dtype, device=device)
        runs: list[Run] = []
        start = 0
        for leaf in wanted.leaves:
            runs.append(self._run(owned[start : start + leaf.shape[0]], leaf))
            start += leaf.shape[0]
        return owned, runs

    def _run(self, target: Tensor, wanted: TensorSlice) -> Run:
        source = self.find(wanted)
        stored, dtype = self._entry(source.name), self.dtype(source.name)
        if (dtype is torch.int8) != (target.dtype is torch.int8):
            raise CheckpointError(
                f"{self.path}: tensor {source.name} has dtype {stored.dtype}; "
                f"it cannot be read as {target.dtype}"
            )
        if not _fits(stored.shape, extent_on_disk(wanted, source), source):
            raise CheckpointError(
                f"{self.path}: tensor {source.name} has shape {list(stored.shape)}, "
                f"not {list(extent_on_disk(wanted, source))}"
            )
        # Whatever is wanted lies in one run of bytes: rows of a matrix, or of one of a stack.
        first = source.start or 0
        if source.index is not None:
            first += source.index * stored.shape[1]
        rows = target.t() if source.transpose else target
        row_bytes = math.prod(rows.shape[1:]) * dtype.itemsize
        return Run(rows, stored.file, stored.offset + first * row_bytes, dtype, source.name)

    def fill(self, run: Run) -> None:
        """Read a run, piece by piece, through a buffer if need be. Thread-safe.

        Raises CheckpointError.
        """
        rows = run.rows
        step = max(1, _PIECE_BYTES // max(1, run.row_bytes))
        in_place = rows.dtype == run.dtype and rows.is_cpu and rows.is_contiguous()
        shape = (min(step, len(rows)), *rows.shape[1:])
        buffer = None if in_place else torch.empty(shape, dtype=run.dtype)
        try:
            with opened(run.file) as descriptor:
                will_need(descriptor, run.offset, run.num_bytes)
                for start in range(0, len(rows), step):
                    part = rows[start : start + step]
                    piece = part if buffer is None else buffer[: len(part)]
                    offset = run.offset + start * run.row_bytes
                    read_exactly(descriptor, offset, tensor_buffer(piece))
                    if buffer is not None:
                        part.copy_(piece)
                    self._count(piece.nbytes)
        except (OSError, EOFError) as error:
            raise CheckpointError(
                f"{run.file}: tensor {run.name} cannot be read: {error}"
            ) from error

    def _count(self, num_bytes: int) -> None:
        with self._counting:
            self.bytes_read += num_bytes
            if self._on_read is not None:
                self._on_read(num_bytes)

    def _entry(self, name: str) -> StoredTensor:
        if name not in self._tensors:
            raise CheckpointError(f"{self.path}: missing tensor {name}")
        return self._tensors[name]

    def _listed_files(self) -> Mapping[str, set[str]]:
        """File name → tensors that the index promises to be in it."""
        if (self.path / SINGLE_FILE).is_file():
            return {SINGLE_FILE: set()}
        index = self.path / INDEX_FILE
        if not index.is_file():
            raise CheckpointError(f"{self.path}: neither {SINGLE_FILE} nor {INDEX_FILE} is there")
        try:
            weight_map: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            files: dict[str, set[str]] = {}
            for name, file in weight_map.items():
                if not isinstance(file, str):
                    raise TypeError(f"{name}: {file!r} is no file name")
                files.setdefault(file, set()).add(name)
        except OSError as error:
            raise CheckpointError(f"{index}: cannot be read: {error.strerror}") from error
        except RecursionError as error:
            raise CheckpointError(
                f"{index}: not a safetensors index: it is nested too deeply"
            ) from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{index}: not a safetensors index: {error!r}") from error
        return dict(sorted(files.items()))

    def _add_file(self, file: Path, listed: set[str]) -> None:
        if not file.is_file():
            raise CheckpointError(f"{file}: missing file")
        try:
            tensors = read_header(file)
        except OSError as error:
            raise CheckpointError(f"{file}: cannot be read: {error.strerror or error}") from error
        except SafetensorError as error:
            raise CheckpointError(f"{file}: corrupt or truncated file: {error}") from error
        for name in sorted(listed - tensors.keys()):
            raise CheckpointError(f"{file}: the index promises tensor {name}, which is not in it")
        for name in sorted(tensors.keys() & self._tensors.keys()):
            raise CheckpointError(f"{file}: tensor {name} is in another file as well")
        self._tensors.update(tensors)


def open_model(path: Path | str, on_read: OnRead | None = None) -> tuple[ModelConfig, Checkpoint]:
    """A folder's model, with every head that its files hold, and the files.

    Raises ConfigError, CheckpointError, and OSError where there is no config.json.
    """
    config, checkpoint = load_config(Path(path)), Checkpoint(path, on_read)
    return config.with_tensors(checkpoint.names), checkpoint


def extent_on_disk(wanted: TensorSlice, source: TensorSource) -> tuple[int, ...]:
    """The least shape that the tensor on disk must have to hold `wanted`."""
    shape = tuple(reversed(wanted.shape)) if source.transpose else wanted.shape
    if source.stop is not None:
        shape = (source.stop, *shape[1:])
    return shape if source.index is None else (source.index + 1, *shape)


def _fits(shape: tuple[int, ...], extent: tuple[int, ...], source: TensorSource) -> bool:
    """Sliced dimensions may be longer than what is wanted of them, all others must be equal."""
    stacked = source.index is not None
    sliced = {0} if stacked else set()
    if source.stop is not None:
        sliced.add(1 if stacked else 0)
    return len(shape) == len(extent) and all(
        have >= need if dim in sliced else have == need
        for dim, (have, need) in enumerate(zip(shape, extent, strict=True))
    )
