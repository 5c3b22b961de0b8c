"""Transformers as the oracle, with each remedy it needs, and the check that every way agrees."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.models.driver import Chunk, Served, in_chunks, read_checkpoint, tokens_of
from tests.tiny import load_reference, reference_logits, write_tiny


def tiny(family: str, folder: Path, **overrides: Any) -> Path:
    """A tiny random checkpoint; `overrides` are config.json keys.

    Jamba's weights are halved: with larger ones the recurrence amplifies float32 rounding beyond
    the tolerance, in Transformers' own float32 against its float64 just as in ours.
    """
    write_tiny(family, folder, **overrides)
    if family == "jamba":
        tensors = read_checkpoint(folder)
        for name, tensor in tensors.items():
            if tensor.dim() == 2 and not name.endswith("A_log"):
                tensor.mul_(0.5)
        write_checkpoint(folder, tensors)
    return folder


def write_checkpoint(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Replace the folder's only safetensors file."""
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def edit_config(folder: Path, **keys: Any) -> None:
    """Set top-level keys of config.json; None inside a section is kept as null."""
    file = folder / "config.json"
    config = json.loads(file.read_text())
    for key, value in keys.items():
        merge = isinstance(value, dict) and isinstance(config.get(key), dict)
        config[key] = {**config[key], **value} if merge else value
    file.write_text(json.dumps(config))


def reference(folder: Path, tokens: Sequence[int]) -> Tensor:
    """Logits [T, V] of one full forward, without padding and without cache.

    `load_reference` already takes DBRX's RoPE base from attn_config and switches PhiMoE's LongRoPE
    factors with the length. No cache, because Transformers restarts Jamba's state on a second
    chunk and refuses caches for stacks without attention; no padding, because a biased in_proj
    leaks into padded rows.
    """
    return reference_logits(load_reference(folder), tokens)


def unclamped_reference(folder: Path, tokens: Sequence[int]) -> Tensor:
    """DBRX with clip_qkv null: Transformers 5 cannot clamp to nothing, so clamp to 1e30."""
    own = (folder / "config.json").read_text()
    edit_config(folder, attn_config={"clip_qkv": 1e30})
    logits = reference(folder, tokens)
    (folder / "config.json").write_text(own)
    return logits


def assert_close(actual: Tensor, expected: Tensor) -> None:
    """The numbers contract's tolerance."""
    torch.testing.assert_close(actual.float(), expected, atol=1e-5, rtol=1e-4)


def assert_all_ways(folder: Path, expected: Tensor | None, tokens: Sequence[int]) -> Tensor:
    """A full prefill meets the reference; chunks, decode steps, a packed mixed batch, scattered
    blocks of another size and two stages give its very bits, in float32 and (shorter) bfloat16."""
    served = Served.open(folder)
    full = served.step([Chunk(0, 0, tokens)])[0]
    if expected is not None:
        assert_close(full, expected)
    assert_same_bits(in_chunks(served, 1, tokens, [1]), full, "decode steps")
    assert_same_bits(in_chunks(served, 2, tokens, [3, 17, 2]), full, "chunked prefill")
    cut = served.config.num_layers // 2
    other = Served.open(folder, cuts=[cut] if cut else [], block_size=4)
    assert_same_bits(_in_company(other, tokens), full, "packed mixed batch, two stages")
    return full


def _in_company(served: Served, tokens: Sequence[int]) -> Tensor:
    """The sequence in two chunks and decode steps, each in a batch with other sequences."""
    vocab = served.config.vocab_size
    longer, shorter = tokens_of(11, 30, vocab), tokens_of(12, 5, vocab)
    half, length = len(tokens) // 2, len(tokens)
    served.step([Chunk(0, 0, longer[:-3])])
    rows = [
        served.step([Chunk(0, 27, longer[27:28]), Chunk(3, 0, tokens[:half], length)])[1],
        served.step(
            [
                Chunk(4, 0, shorter),
                Chunk(3, half, tokens[half:-2], length),
                Chunk(0, 28, longer[28:29]),
            ]
        )[1],
    ]
    for last in (2, 1):
        piece = tokens[length - last : length - last + 1]
        mine = Chunk(3, length - last, piece, length)
        rows.append(served.step([mine, Chunk(0, 31 - last, longer[-1:])])[0])
    return torch.cat(rows)


def assert_same_bits(actual: Tensor, expected: Tensor, way: str) -> None:
    """Equality of every bit but the sign of zero."""
    assert torch.equal(actual, expected), (
        f"{way}: {(actual != expected).sum()} of {actual.numel()} logits differ"
    )
