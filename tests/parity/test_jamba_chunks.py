"""Jamba: a sequence in pieces, alone and among others, is the sequence in one piece."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from tests.models.driver import tokens_of
from tests.parity.battery import Arrays, assert_close, assert_same_bits
from tests.parity.cases import case
from tests.parity.executors import LocalRunner, Runner, pipeline
from tests.parity.jamba import SHORT, jamba, reference, schedule
from tests.parity.remedies import load
from tests.parity.session import Session, in_one_batch

MIXED = schedule((3, 1), (2, 1), 3)
"""Mamba, attention with experts, Mamba."""

Open = Callable[[Path], AbstractContextManager[Runner]]
EXECUTORS: list[Open] = [lambda folder: nullcontext(LocalRunner(folder)), pipeline]
everywhere = pytest.mark.parametrize("opened", EXECUTORS, ids=["local", "pipeline"])


Pieces = Sequence[tuple[Sequence[int], Sequence[int]]]
"""Sequences of tokens, each with how many of them it brings to every step; 0 is a pause."""


def in_pieces(session: Session, pieces: Pieces) -> list[Arrays]:
    """All sequences side by side, each one's next chunk in every step."""
    ids = [session.start(tokens) for tokens, _ in pieces]
    for step in range(max(len(sizes) for _, sizes in pieces)):
        current = {i: sizes[step : step + 1] for i, (_, sizes) in zip(ids, pieces, strict=True)}
        session.step({i: size[0] for i, size in current.items() if size and size[0]})
    return [session.finish(i) for i in ids]


def assert_pieces(opened: Open, folder: Path, pieces: Pieces) -> None:
    """Their logits are the reference's, and the bits of one packed batch of them."""
    sequences = [tokens for tokens, _ in pieces]
    with opened(folder) as runner:
        session = Session(runner)
        cut = in_pieces(session, pieces)
        whole = in_one_batch(session, sequences)
    expected = {tuple(t): r for t, r in zip(sequences, reference(folder, sequences), strict=True)}
    for (tokens, sizes), arrays, packed in zip(pieces, cut, whole, strict=True):
        assert_close(arrays["logits"], expected[tuple(tokens)], f"chunks of {sizes}")
        assert_same_bits(arrays, packed, f"chunks of {sizes}")


@case(48, "Jamba", "prompts shorter than the convolution, then decoding")
@everywhere
@pytest.mark.parametrize("kernel", [4, 6], ids=["kernel 4", "kernel 6"])
def test_short_prompts(tmp_path: Path, kernel: int, opened: Open) -> None:
    folder = jamba(tmp_path, **MIXED, mamba_d_conv=kernel)
    pieces = [(tokens_of(n, n + 8), [n, *[1] * 8]) for n in (1, 2, 3)]
    assert_pieces(opened, folder, pieces)


@case(49, "Jamba", "prefill in two and in three chunks, cut everywhere")
@everywhere
def test_every_split(tmp_path: Path, opened: Open) -> None:
    tokens = tokens_of(6, 18)
    cuts = [(a,) for a in range(1, 18)] + list(combinations(range(1, 9), 2))
    pieces = [(tokens, torch.tensor([0, *c, 18]).diff().tolist()) for c in cuts]
    assert_pieces(opened, jamba(tmp_path, **MIXED), pieces)


@case(49, "Jamba", "prefill in two and in three chunks, cut everywhere")
@torch.no_grad()
def test_transformers_restarts_the_state_in_a_second_chunk(tmp_path: Path) -> None:
    """Why the reference is one full forward."""
    model, tokens = load(jamba(tmp_path, **MIXED)), tokens_of(6, 18)
    cache = DynamicCache(config=model.config)
    model(input_ids=torch.tensor([tokens[:9]]), past_key_values=cache, use_cache=True)
    rest = model(input_ids=torch.tensor([tokens[9:]]), past_key_values=cache, use_cache=True)
    whole = model(input_ids=torch.tensor([tokens]), use_cache=False)
    assert (rest.logits - whole.logits[:, 9:]).abs().max() > 0.01


@case(50, "Jamba", "twenty decode steps after prompts of one and of many tokens")
@everywhere
def test_decoding(tmp_path: Path, opened: Open) -> None:
    pieces = [(tokens_of(7 + n, n + 20), [n, *[1] * 20]) for n in (1, 20, 33)]
    assert_pieces(opened, jamba(tmp_path, **MIXED), pieces)


@case(51, "Jamba", "packed batches of sequences of many lengths at many stages, without padding")
@everywhere
@pytest.mark.parametrize("seed", [0, 1], ids=["seed 0", "seed 1"])
def test_ragged_batches(tmp_path: Path, seed: int, opened: Open) -> None:
    """Prefills, chunks and decodes of any length in one batch, sequences coming, pausing and
    going."""
    rng = random.Random(seed)
    pieces = []
    for length in rng.sample([1, 2, 3, 4, 7, 8, 9, 16, 23, 40, 64], 8):
        cuts = sorted(rng.sample(range(1, length), rng.randint(0, min(5, length - 1))))
        sizes = torch.tensor([0, *cuts, length]).diff().tolist()
        for at in rng.choices(range(len(sizes)), k=3):
            sizes.insert(at, 0)
        pieces.append((tokens_of(length, length), sizes))
    assert_pieces(opened, jamba(tmp_path, **MIXED), pieces)


@case(51, "Jamba", "packed batches of sequences of many lengths at many stages, without padding")
@torch.no_grad()
def test_transformers_decays_its_state_over_padding(tmp_path: Path, full_forward: Any) -> None:
    """Why nothing is padded on the right: what follows the pads is wrong."""
    model, tokens = load(jamba(tmp_path, **SHORT)), tokens_of(3, 9)
    cache = DynamicCache(config=model.config)
    padded, mask = [*tokens[:8], 0, 0, 0], [*[1] * 8, 0, 0, 0]
    model(
        input_ids=torch.tensor([padded]),
        attention_mask=torch.tensor([mask]),
        past_key_values=cache,
        use_cache=True,
    )
    step: Tensor = model(
        input_ids=torch.tensor([tokens[8:]]),
        attention_mask=torch.tensor([[*mask, 1]]),
        past_key_values=cache,
        use_cache=True,
    ).logits[0, -1]
    assert (step - full_forward(model, tokens).logits[0, -1]).abs().max() > 0.01
