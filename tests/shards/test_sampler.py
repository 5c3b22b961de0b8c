"""The sampler against plain restatements of its rules."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from router.step import NO_TOKEN, Sampled, SamplingParams
from shards.draw import uniform
from shards.logits_processors import IdRanges, TokenHistory
from shards.sampler import SampleRequest, sample
from tests.shards import sampling_oracle as oracle

GREEDY = SamplingParams(max_tokens=8, temperature=0.0)


def request(sampling: SamplingParams, position: int = 0, seq_id: int = 0) -> SampleRequest:
    return SampleRequest(seq_id=seq_id, history=TokenHistory((), [0] * position), sampling=sampling)


def one(row: Tensor, sampling: SamplingParams, position: int = 0) -> Sampled:
    return sample(row[None], [request(sampling, position)])[0]


def random_logits(rows: int, vocab: int, seed: int = 0) -> Tensor:
    return torch.randn((rows, vocab), generator=torch.Generator().manual_seed(seed)) * 3


def expected_distribution(row: Tensor, sampling: SamplingParams) -> dict[int, float]:
    weights = oracle.distribution(row.tolist(), sampling)
    total = sum(weights.values())
    return {i: w / total for i, w in weights.items() if w}


def test_greedy_takes_the_lowest_of_equals() -> None:
    row = torch.tensor([0.0, 3.0, 1.0, 3.0])
    assert one(row, GREEDY).token_id == 1


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.3},
        {"top_k": 4},
        {"top_p": 0.7},
        {"min_p": 0.2},
        {"temperature": 1.7, "top_k": 6, "top_p": 0.8, "min_p": 0.05},
    ],
)
def test_frequencies_follow_the_distribution(options: dict[str, float]) -> None:
    row = random_logits(1, 12, seed=3)[0] / 2
    sampling = SamplingParams(max_tokens=1, seed=11, **options)  # type: ignore[arg-type]
    expected = expected_distribution(row, sampling)
    draws = 4000
    counts = dict.fromkeys(range(12), 0)
    for position in range(draws):
        counts[one(row, sampling, position).token_id] += 1
    assert {i for i, c in counts.items() if c} <= set(expected)
    for i, p in expected.items():
        assert abs(counts[i] / draws - p) < 5 * math.sqrt(p * (1 - p) / draws) + 1e-9


def test_every_number_falls_on_the_inverse_cdf() -> None:
    row = random_logits(1, 3000, seed=5)[0] / 8  # flat: the nucleus outgrows the first candidates
    sampling = SamplingParams(max_tokens=1, seed=2, top_p=0.95)
    expected = expected_distribution(row, sampling)
    assert len(expected) > 1024
    ranked = list(expected)
    edges = np.cumsum(list(expected.values()))
    for position in range(200):
        number = uniform(2, 0, position)
        at = int(np.searchsorted(edges, number, side="right"))
        if abs(edges[at] - number) < 1e-9 or (at and abs(edges[at - 1] - number) < 1e-9):
            continue
        assert one(row, sampling, position).token_id == ranked[at]


samplings = st.builds(
    SamplingParams,
    max_tokens=st.just(1),
    temperature=st.sampled_from((0.0, 5e-324, 0.01, 0.6, 1.0, 1.0, 2.0, 1e6)),
    top_p=st.sampled_from((1.0, 1.0, 0.0, 1e-3, 0.3, 0.8, 0.95, 0.9999, 1 - 2**-53)),
    top_k=st.sampled_from((0, 0, 1, 2, 7, 40, 10_000)),
    min_p=st.sampled_from((0.0, 0.0, 0.02, 0.4, 1.0)),
    seed=st.integers(-(2**63), 2**64 - 1),
    sample_idx=st.integers(0, 9),
    repetition_penalty=st.sampled_from((1.0, 1.5)),
    stop_token_ids=st.just((0, 1)),
    min_tokens=st.integers(0, 2),
    logprobs=st.sampled_from((None, None, 0, 1, 5, 20, 1000)),
)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(samplings, min_size=1, max_size=6),
    st.sampled_from((2, 3, 17, 60, 511, 513, 700, 1025, 2600)),
    st.sampled_from((0.02, 1.0, 4.0)),
    st.booleans(),
    st.integers(0, 2**32),
    st.sampled_from(((), ((1, 2),))),
)
def test_a_batch_is_what_plain_python_chooses_row_by_row(
    batch: list[SamplingParams],
    vocab: int,
    spread: float,
    with_ties: bool,
    seed: int,
    unused: IdRanges,
) -> None:
    logits = random_logits(len(batch), vocab, seed) * spread / 3
    logits = torch.round(logits * 2) / 2 if with_ties else logits
    requests = [request(s, position=i % 3, seq_id=i) for i, s in enumerate(batch)]
    for found, r, row in zip(sample(logits, requests, unused), requests, logits, strict=True):
        number = uniform(r.sampling.seed, r.sampling.sample_idx, r.position)
        allowed = oracle.processed(row.numpy(), r.sampling, (), r.history.emitted, unused)
        assert found.token_id in oracle.choices(allowed, r.sampling, number)
        if r.sampling.logprobs is None:
            assert (found.logprob, found.top_logprobs) == (None, ())
            continue
        exact = torch.log_softmax(row.double(), -1).tolist()
        best = sorted(range(vocab), key=lambda i: (-row[i].item(), i))[: r.sampling.logprobs]
        assert found.logprob == pytest.approx(exact[found.token_id], abs=1e-5)
        assert [i for i, _ in found.top_logprobs] == best
        assert [p for _, p in found.top_logprobs] == pytest.approx(
            [exact[i] for i in best], abs=1e-5
        )


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_ends_its_own_row(value: float) -> None:
    logits = random_logits(6, 700)
    kinds = (replace(GREEDY, logprobs=2), SamplingParams(max_tokens=1, top_p=0.9, logprobs=2))
    requests = [request(kinds[i % 2], seq_id=i) for i in range(6)]
    expected = sample(logits, requests)
    for i, at in ((2, 0), (3, 699), (5, 350)):
        logits[i, at] = value
        expected[i] = Sampled(seq_id=i, token_id=NO_TOKEN)
    assert sample(logits, requests) == expected


def test_equal_probabilities_keep_the_lower_ids() -> None:
    row = torch.zeros(2000)
    for options in ({"top_k": 3}, {"top_p": 3 / 2000 - 1e-6}):
        sampling = SamplingParams(max_tokens=1, **options)  # type: ignore[arg-type]
        chosen = {one(row, replace(sampling, seed=s)).token_id for s in range(60)}
        assert chosen == {0, 1, 2}


def test_logprobs_are_of_the_raw_logits() -> None:
    row = random_logits(1, 300, seed=8)[0]
    exact = torch.log_softmax(row.double(), -1)
    sampling = SamplingParams(max_tokens=4, temperature=0.2, top_k=2, logprobs=6, min_tokens=1)
    got = one(row, replace(sampling, stop_token_ids=(int(row.argmax()),)))
    assert got.logprob == pytest.approx(float(exact[got.token_id]), abs=1e-5)
    ids = [i for i, _ in got.top_logprobs]
    assert ids == torch.sort(row, descending=True, stable=True).indices[:6].tolist()
    assert [p for _, p in got.top_logprobs] == pytest.approx(exact[ids].tolist(), abs=1e-5)
    assert all(type(i) is int and type(p) is float for i, p in got.top_logprobs)
    assert type(got.logprob) is float


def test_no_logprobs_unless_asked() -> None:
    row = random_logits(1, 20)[0]
    assert one(row, GREEDY).logprob is None
    only = one(row, replace(GREEDY, logprobs=0))
    assert only.logprob is not None
    assert only.top_logprobs == ()
    assert len(one(row, replace(GREEDY, logprobs=50)).top_logprobs) == 20


def test_min_tokens_holds_the_stop_tokens_back() -> None:
    row = torch.tensor([1.0, 5.0, 4.0, 3.0])
    sampling = replace(GREEDY, min_tokens=2, stop_token_ids=(1, 2, 99))
    assert [one(row, sampling, p).token_id for p in range(3)] == [3, 3, 1]
    assert row.tolist() == [1.0, 5.0, 4.0, 3.0]


def test_bfloat16_logits_are_widened() -> None:
    row = random_logits(1, 100)[0].bfloat16()
    sampling = SamplingParams(max_tokens=1, seed=4, logprobs=2)
    assert one(row, sampling) == one(row.float(), sampling)


def test_tiny_temperature_is_greedy() -> None:
    row = random_logits(1, 50, seed=1)[0]
    assert one(row, SamplingParams(max_tokens=1, temperature=1e-300)).token_id == int(row.argmax())


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_unused_rows_of_the_vocabulary_are_never_sampled(temperature: float) -> None:
    row = torch.tensor([[9.0, 7.5, 8.0, 7.0, 9.5, 9.5]])
    params = SamplingParams(max_tokens=1, temperature=temperature, logprobs=2)
    seen = set()
    for position in range(200):
        drawn = sample(row, [request(params, position)], ((0, 1), (4, 6)))[0]
        seen.add(drawn.token_id)
        # Log-probabilities stay those of the model.
        expected = float(torch.log_softmax(row, -1)[0, drawn.token_id])
        assert drawn.logprob == pytest.approx(expected)
    assert seen == ({2} if temperature == 0 else {1, 2, 3})
