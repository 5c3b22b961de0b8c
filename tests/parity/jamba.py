"""Tiny Jamba checkpoints, their reference, and the check that most Jamba cases make."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.models.driver import tokens_of
from tests.models.oracle import tiny
from tests.parity.battery import Arrays, assert_every_way, assert_everywhere
from tests.parity.executors import LocalRunner, pipeline
from tests.parity.remedies import load, logits_of
from tests.parity.session import Session, in_one_batch

SEQUENCES = [tokens_of(1, 30), tokens_of(2, 1), tokens_of(3, 9), tokens_of(4, 17)]


def schedule(attn: tuple[int, int], experts: tuple[int, int], layers: int) -> dict[str, int]:
    """config.json keys of (period, offset) of attention and of expert layers."""
    return {
        "attn_layer_period": attn[0],
        "attn_layer_offset": attn[1],
        "expert_layer_period": experts[0],
        "expert_layer_offset": experts[1],
        "num_hidden_layers": layers,
    }


SHORT = schedule((2, 1), (2, 1), 2)
"""A dense Mamba layer, then attention with experts."""
CROSSED = schedule((2, 1), (2, 0), 2)
"""Mamba with experts, then dense attention."""
RECURRENT = schedule((8, 4), (2, 1), 3)
"""Mamba layers alone, the second one with experts."""


def jamba(folder: Path, **overrides: Any) -> Path:
    """A tiny checkpoint; `overrides` are config.json keys."""
    return tiny("jamba", folder, **overrides)


def reference(folder: Path, sequences: Sequence[Sequence[int]] = SEQUENCES) -> list[Tensor]:
    """Logits [n, V] of each sequence.

    In float64: over eight layers of recurrence Transformers' own float32 is further from it than
    the tolerance.
    """
    return logits_of(load(folder, torch.float64), sequences)


def assert_parity(
    folder: Path, sequences: Sequence[Sequence[int]] = SEQUENCES, **options: Any
) -> list[Arrays]:
    """A checkpoint's logits are Transformers', everywhere; `options` of `assert_everywhere`."""
    return assert_everywhere(folder, sequences, reference(folder, sequences), **options)


def same_bits_everywhere(
    folder: Path,
    sequences: Sequence[Sequence[int]],
    *,
    dtype: str = "float32",
    quantization: str = "none",
) -> list[Tensor]:
    """Logits [n, V] of each sequence, the same in every way on both executors."""
    local = Session(LocalRunner(folder, dtype, quantization))
    packed = in_one_batch(local, sequences)
    assert_every_way(local, sequences, packed, where="local")
    with pipeline(folder, dtype=dtype, quantization=quantization) as runner:
        assert_every_way(Session(runner), sequences, packed, where="pipeline")
    return [arrays["logits"] for arrays in packed]
