"""A row's bits do not depend on its company: the whole sampler, and each operation in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from router.step import SamplingParams
from shards.logits_processors import IdRanges, TokenHistory
from shards.sampler import SampleRequest, greatest_ids, sample

SIZES = (1, 2, 7, 31, 33, 255, 511, 513, 1025, 5003, 32_064, 32_767, 50_257, 65_536, 100_352)
VOCABS = st.one_of(st.sampled_from(SIZES), st.integers(1, 3000))
PLAIN = SamplingParams(max_tokens=8)
KINDS = (
    replace(PLAIN, temperature=0.0, logprobs=5),
    replace(PLAIN, logprobs=3),
    replace(PLAIN, top_p=0.9, logprobs=0),
    replace(PLAIN, top_p=0.95, temperature=3.0),  # flat: the first candidates fall short
    replace(PLAIN, top_k=20, temperature=0.5, logprobs=20),
    replace(PLAIN, top_k=900, top_p=0.8, min_p=0.001),
    replace(PLAIN, min_p=0.01, top_p=0.99),
    replace(PLAIN, temperature=0.7, repetition_penalty=1.2, frequency_penalty=0.3, logprobs=1),
    replace(PLAIN, temperature=0.0, logit_bias=((0, 9.0),), presence_penalty=-0.7),
    replace(PLAIN, min_tokens=9, stop_token_ids=(0, 1), top_p=0.5),
    replace(PLAIN, allowed_token_ids=(0,), bad_words=((0,),), logprobs=2),
)


def random_logits(rows: int, vocab: int, seed: int, spread: float = 3.0) -> Tensor:
    return torch.randn((rows, vocab), generator=torch.Generator().manual_seed(seed)) * spread


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def misaligned(values: Tensor, offset: int, gap: int) -> Tensor:
    """The same values in rows that begin `offset` elements late and lie `gap` elements apart."""
    rows, vocab = values.shape
    storage = torch.full((rows, offset + vocab + gap), 7.0, dtype=values.dtype)
    storage[:, offset : offset + vocab] = values
    return storage[:, offset : offset + vocab]


def requests_for(rows: int, vocab: int, seed: int) -> list[SampleRequest]:
    random = np.random.default_rng(seed)
    return [
        SampleRequest(
            seq_id=i,
            history=TokenHistory(
                random.integers(0, vocab, 20).tolist(),
                random.integers(0, vocab, random.integers(0, 12)).tolist(),
            ),
            sampling=replace(KINDS[random.integers(len(KINDS))], seed=i),
        )
        for i in range(rows)
    ]


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 40),
    VOCABS,
    st.integers(0, 2**32),
    st.sampled_from((0.1, 1.0, 3.0)),
    st.integers(0, 17),
    st.integers(0, 17),
    st.booleans(),
)
def test_a_row_alone_is_the_row_in_company(
    rows: int, vocab: int, seed: int, spread: float, offset: int, gap: int, padded: bool
) -> None:
    rows = max(1, min(rows, 400_000 // vocab))
    logits, requests = random_logits(rows, vocab, seed, spread), requests_for(rows, vocab, seed)
    unused: IdRanges = ((vocab - 1, vocab),) if padded and vocab > 3 else ()
    together = sample(logits, requests, unused)
    assert [
        sample(logits[i][None], requests[i : i + 1], unused)[0] for i in range(rows)
    ] == together
    order = np.random.default_rng(seed).permutation(rows)[: rows // 2 + 1].tolist()
    moved = misaligned(logits[order], offset, gap)
    assert sample(moved, [requests[i] for i in order], unused) == [together[i] for i in order]
    alone = moved[-1:]
    assert sample(alone, [requests[order[-1]]], unused) == [together[order[-1]]]


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("vocab", [32_064, 50_257, 65_536, 100_352])
def test_at_the_sizes_of_real_vocabularies(vocab: int) -> None:
    rows = 2 * len(KINDS)
    logits, requests = random_logits(rows, vocab, 5), requests_for(rows, vocab, 5)
    requests = [replace(r, sampling=KINDS[i // 2]) for i, r in enumerate(requests)]
    together = sample(logits, requests)
    for i in range(rows):
        assert sample(logits[i : i + 1].clone(), requests[i : i + 1]) == [together[i]]


Float64 = NDArray[np.float64]
OPERATIONS: dict[str, Callable[[Float64], Any]] = {
    "exp": np.exp,
    "running sum": lambda x: x.cumsum(axis=1),
    "sums of blocks": lambda x: np.add.reduceat(x, np.arange(0, x.shape[1], 512), axis=1),
    "log_softmax": lambda x: torch.log_softmax(torch.from_numpy(x).float(), dim=-1).numpy(),
}


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("vocab", SIZES)
def test_an_operation_on_a_row_is_the_same_in_any_place(name: str, vocab: int) -> None:
    operation = OPERATIONS[name]
    rows = max(2, min(33, 300_000 // vocab))
    values = -random_logits(rows, vocab, vocab).double().abs().numpy()
    together = operation(values)
    for i in range(rows):
        np.testing.assert_array_equal(operation(values[i : i + 1].copy())[0], together[i])
    for offset in (1, 3, 8):
        moved = misaligned(torch.from_numpy(values[1:]), offset, 1).numpy()
        np.testing.assert_array_equal(operation(moved), together[1:])


def test_an_exponential_does_not_depend_on_its_place_in_a_vector() -> None:
    values = -np.abs(random_logits(1, 70, 1).double().numpy()[0])
    whole = np.exp(values)
    for size in range(1, 71):
        for start in range(70 - size + 1):
            part = slice(start, start + size)
            np.testing.assert_array_equal(np.exp(values[part]), whole[part])


@pytest.mark.parametrize("operation", ["running sum", "exp"])
def test_what_stands_behind_the_end_changes_nothing(operation: str) -> None:
    values = np.exp(-np.abs(random_logits(5, 1000, 2).double().numpy()))
    for end in (1, 9, 511, 999):
        found = OPERATIONS[operation](np.ascontiguousarray(values[:, :end]))
        np.testing.assert_array_equal(found, OPERATIONS[operation](values)[:, :end])


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 6), VOCABS, st.integers(0, 40), st.booleans(), st.integers(0, 2**32))
def test_the_greatest_are_found_lowest_ids_first(
    rows: int, vocab: int, count: int, with_ties: bool, seed: int
) -> None:
    values = random_logits(rows, vocab, seed)
    values = values.round() if with_ties else values
    expected = torch.sort(values, dim=-1, descending=True, stable=True).indices[:, :count]
    np.testing.assert_array_equal(greatest_ids(values.numpy(), count), expected)
