"""Tiny checkpoints taken apart: tensors changed, and spread over files."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from tests.models.driver import read_checkpoint
from tests.models.oracle import write_checkpoint

INDEX = "model.safetensors.index.json"


@contextmanager
def tensors_of(folder: Path) -> Iterator[dict[str, Tensor]]:
    """Every tensor of a single-file checkpoint; what was changed is written back."""
    tensors = read_checkpoint(folder)
    yield tensors
    write_checkpoint(folder, tensors)


def spread(folder: Path, tensors: Mapping[str, Tensor], file_of: Callable[[str], str]) -> None:
    """Write a sharded checkpoint in place of whatever weights are there; `file_of` names files."""
    for old in (*folder.glob("*.safetensors"), *folder.glob(INDEX)):
        old.unlink()
    weight_map = {name: file_of(name) for name in tensors}
    for file in set(weight_map.values()):
        held = {name: tensor for name, tensor in tensors.items() if weight_map[name] == file}
        save_file(held, folder / file, metadata={"format": "pt"})
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
