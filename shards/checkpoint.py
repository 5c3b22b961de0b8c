"""Safetensors checkpoints on disk: checked first, then read by the row."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from models.interface import TensorSlice, TensorSource

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


class CheckpointError(ValueError):
    """A checkpoint that cannot be served; the message names the file or tensor and the reason."""


class Checkpoint:
    """A folder with `model.safetensors`, or with its sharded form and index.

    Every header is read and checked against its file's size up front; a tensor's data is read
    only when asked for. Raises CheckpointError.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.bytes_read = 0
        """Bytes of tensor data read so far."""
        self._files: dict[str, Any] = {}
        """Open file of each tensor."""
        self._tensors: dict[str, tuple[tuple[int, ...], str]] = {}
        for file, listed in self._listed_files().items():
            self._open(self.path / file, listed)

    @property
    def names(self) -> frozenset[str]:
        """Every tensor in the files."""
        return frozenset(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape on disk. Raises CheckpointError when there is no such tensor."""
        return self._entry(name)[0]

    def dtype(self, name: str) -> torch.dtype:
        """Dtype on disk. Raises CheckpointError when it is not a floating-point one."""
        spelling = self._entry(name)[1]
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

    def read(
        self, wanted: TensorSlice, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> Tensor:
        """The wanted rows alone, contiguous, in memory of their own. Raises CheckpointError."""
        source = self.find(wanted)
        self.dtype(source.name)
        if not _fits(self.shape(source.name), extent_on_disk(wanted, source), source):
            raise CheckpointError(
                f"{self.path}: tensor {source.name} has shape {list(self.shape(source.name))}, "
                f"not {list(extent_on_disk(wanted, source))}"
            )
        entry: Any = self._files[source.name].get_slice(source.name)
        rows = slice(source.start, source.stop)
        values: Tensor = entry[rows] if source.index is None else entry[source.index, rows]
        self.bytes_read += values.nbytes
        # Always a copy: a view of the mapped file would change, or crash us, if the file did.
        owned = torch.empty(wanted.shape, dtype=dtype, device=device)
        return owned.copy_(values.t() if wanted.transpose else values)

    def _entry(self, name: str) -> tuple[tuple[int, ...], str]:
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
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{index}: not a safetensors index: {error!r}") from error
        return dict(sorted(files.items()))

    def _open(self, file: Path, listed: set[str]) -> None:
        if not file.is_file():
            raise CheckpointError(f"{file}: missing file")
        try:
            opened: Any = safe_open(file, framework="pt")
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file}: corrupt or truncated file: {error}") from error
        names = set(opened.keys())
        for name in sorted(listed - names):
            raise CheckpointError(f"{file}: the index promises tensor {name}, which is not in it")
        for name in sorted(names):
            if name in self._files:
                raise CheckpointError(f"{file}: tensor {name} is in another file as well")
            entry = opened.get_slice(name)
            self._files[name] = opened
            self._tensors[name] = (tuple(entry.get_shape()), entry.get_dtype())


def extent_on_disk(wanted: TensorSlice, source: TensorSource) -> tuple[int, ...]:
    """The least shape that the tensor on disk must have to hold `wanted`."""
    shape = tuple(reversed(wanted.shape)) if wanted.transpose else wanted.shape
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
