"""Logits processors against Transformers' own and plain restatements of OpenAI's formulas."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from transformers import NoBadWordsLogitsProcessor, RepetitionPenaltyLogitsProcessor

from router.step import SamplingParams
from shards.logits_processors import IdRanges, TokenHistory, process
from shards.sampler import SampleRequest, sample
from tests.groups import ask, running_group
from tests.shards import sampling_oracle as oracle
from tests.tiny import write_tiny

VOCAB = 50
PROMPT = (3, 4, 4, 9, 11)
EMITTED = (4, 7, 7, 7, 20, 3)


def row(seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(0, 3, VOCAB).astype(np.float32)


def processed(
    logits: NDArray[np.float32], *, unused: Any = (), emitted: Any = EMITTED, **fields: Any
) -> NDArray[np.float32]:
    before = logits.copy()
    sampling = SamplingParams(max_tokens=9, **fields)
    changed, rows = process(logits[None], [sampling], [TokenHistory(PROMPT, emitted)], unused)
    assert (logits == before).all(), "the raw logits give the log-probabilities"
    assert len(rows) == len(changed)
    return rows[0] if changed else logits


def transformers(processor: Any, logits: NDArray[np.float32]) -> NDArray[np.float32]:
    ids = torch.tensor([[*PROMPT, *EMITTED]])
    result: NDArray[np.float32] = processor(ids, torch.tensor(logits)[None].clone())[0].numpy()
    return result


def test_nothing_asked_nothing_copied() -> None:
    logits = row()
    assert processed(logits) is logits
    assert processed(logits, emitted=(), presence_penalty=1.0) is logits


@pytest.mark.parametrize("penalty", [0.5, 1.2, 3.0])
def test_repetition_is_transformers(penalty: float) -> None:
    logits = row(1)
    expected = transformers(RepetitionPenaltyLogitsProcessor(penalty), logits)
    np.testing.assert_array_equal(processed(logits, repetition_penalty=penalty), expected)


def test_presence_and_frequency_are_openais() -> None:
    logits = row(2)
    counts = Counter(EMITTED)
    expected = [
        x - np.float32(0.7) * counts[i] - (np.float32(-1.5) if i in counts else 0)
        for i, x in enumerate(logits)
    ]
    found = processed(logits, frequency_penalty=0.7, presence_penalty=-1.5)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_bad_words_are_transformers() -> None:
    logits = row(3)
    # In full; matching the end of what was emitted; not matching; one that the prompt would end.
    words = ((8,), (20, 3, 30), (7, 3, 31), (5, 32), (3, 33))
    expected = transformers(
        NoBadWordsLogitsProcessor([list(w) for w in words], eos_token_id=49), logits
    )
    found = processed(logits, bad_words=words)
    np.testing.assert_array_equal(found, expected)
    assert np.flatnonzero(np.isneginf(found)).tolist() == [8, 30, 33]


def test_bias_masks_and_minimum() -> None:
    logits = row(4)
    found = processed(logits, logit_bias=((2, 5.0), (3, -100.0)))
    assert found[2] == logits[2] + np.float32(5)
    assert found[3] == logits[3] - np.float32(100)
    allowed = processed(logits, allowed_token_ids=(1, 45), unused=((40, 50),))
    assert np.flatnonzero(np.isfinite(allowed)).tolist() == [1, 45]
    unused = processed(logits, unused=((0, 3), (40, 50)))
    assert np.flatnonzero(np.isneginf(unused)).tolist() == [0, 1, 2, *range(40, 50)]
    early = processed(logits, stop_token_ids=(5, 99), min_tokens=7)
    assert np.flatnonzero(np.isneginf(early)).tolist() == [5]
    assert processed(logits, stop_token_ids=(5,), min_tokens=6) is logits


def test_bans_give_way_where_they_leave_nothing() -> None:
    logits = row(5)
    found = processed(logits, allowed_token_ids=(5,), bad_words=((5,),))
    assert np.flatnonzero(np.isfinite(found)).tolist() == [5]


def test_history_counts_what_is_appended() -> None:
    grown = TokenHistory(PROMPT, ())
    assert counts(grown) == dict.fromkeys(PROMPT, 0)
    for length, token_id in enumerate(EMITTED * 9, start=1):
        grown.append(token_id + length // 7)
    assert counts(grown) == counts(TokenHistory(PROMPT, grown.emitted))
    assert counts(grown) == {i: grown.emitted.count(i) for i in {*PROMPT, *grown.emitted}}
    assert grown.last == grown.emitted[-1]


def counts(history: TokenHistory) -> dict[int, float]:
    ids, times = history.seen
    assert len(set(ids.tolist())) == len(ids)
    return dict(zip(ids.tolist(), times.tolist(), strict=True))


ids = st.integers(0, VOCAB - 1)
params = st.builds(
    SamplingParams,
    max_tokens=st.just(9),
    min_tokens=st.integers(0, 6),
    stop_token_ids=st.lists(st.sampled_from((3, 4, 7, -3, VOCAB)), max_size=4).map(tuple),
    bad_words=st.lists(st.lists(st.sampled_from((3, 4, 7)), min_size=1, max_size=3).map(tuple)).map(
        tuple
    ),
    allowed_token_ids=st.lists(st.sampled_from((3, 4, 7)), max_size=2).map(tuple),
    logit_bias=st.lists(st.tuples(ids, st.floats(-100, 100)), max_size=4).map(tuple),
    repetition_penalty=st.sampled_from((1.0, 1.3, 0.4)),
    frequency_penalty=st.sampled_from((0.0, -1.1, 0.7)),
    presence_penalty=st.sampled_from((0.0, 1.9, -0.3)),
)
sequences = st.tuples(
    params, st.lists(ids, max_size=9), st.lists(st.sampled_from((3, 4, 7, 11)), max_size=9)
)


@settings(max_examples=200, deadline=None)
@given(st.lists(sequences, max_size=7), st.sampled_from([(), ((0, 2), (40, 44)), ((45, 50),)]))
def test_a_batch_is_its_rows_token_by_token(
    batch: list[tuple[SamplingParams, list[int], list[int]]], unused: IdRanges
) -> None:
    logits = np.random.default_rng(len(batch)).normal(0, 3, (len(batch), VOCAB)).astype(np.float32)
    histories = [TokenHistory(prompt, emitted) for _, prompt, emitted in batch]
    changed, rows = process(logits, [sampling for sampling, _, _ in batch], histories, unused)
    found = dict(zip(changed, rows, strict=True))
    for i, (sampling, prompt, emitted) in enumerate(batch):
        expected = oracle.processed(logits[i], sampling, prompt, emitted, unused)
        np.testing.assert_array_equal(found.get(i, logits[i]), expected)


def test_a_token_outside_the_vocabulary_stays_in_its_row() -> None:
    plain, penalised = (
        SamplingParams(max_tokens=1),
        SamplingParams(max_tokens=1, presence_penalty=1),
    )
    logits = np.stack([row(6), row(7), row(8)])
    histories = [TokenHistory((), [-2])] * 3
    changed, rows = process(logits, [penalised, plain, penalised], histories)
    assert changed == [0, 2]
    np.testing.assert_array_equal(rows[:, :-2], logits[changed][:, :-2])


async def test_a_penalised_answer_is_the_same_on_every_topology(tmp_path: Path) -> None:
    folder = write_tiny("phimoe", tmp_path)
    sampling = SamplingParams(
        max_tokens=40,
        temperature=0.8,
        seed=3,
        repetition_penalty=1.3,
        presence_penalty=0.4,
        frequency_penalty=0.3,
        logprobs=1,
    )
    plain = SamplingParams(max_tokens=40, temperature=0.8, seed=3, logprobs=1)
    with running_group(folder, executor="local") as group:
        expected = await ask(group, PROMPT, sampling)
        assert expected.token_ids != (await ask(group, PROMPT, plain)).token_ids
    with running_group(folder, stages=2, expert_shards=3) as group:
        assert await ask(group, PROMPT, sampling) == expected


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    "fields",
    [
        {"repetition_penalty": 1e-40},
        {"repetition_penalty": 1e40},
        {"logit_bias": ((4, 3e38), (4, 3e38))},
        {"logit_bias": ((4, -3e38), (4, -3e38))},
    ],
)
def test_what_overflows_stays_allowed(fields: Any, temperature: float) -> None:
    """Within float32's range, so that what may not be drawn still is not."""
    allowed = (3, 4, 7)
    sampling = SamplingParams(
        max_tokens=9, allowed_token_ids=allowed, temperature=temperature, **fields
    )
    history = TokenHistory(PROMPT, EMITTED)
    logits = torch.tensor(row())[None]
    request = SampleRequest(seq_id=0, history=history, sampling=sampling)
    (sampled,) = sample(logits, [request])
    assert sampled.token_id in allowed
    values = processed(row(), allowed_token_ids=allowed, **fields)
    assert np.isfinite(values[list(allowed)]).all()
