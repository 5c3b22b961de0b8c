"""Logits processors against Transformers' own and plain restatements of OpenAI's formulas."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import NoBadWordsLogitsProcessor, RepetitionPenaltyLogitsProcessor

from router.step import SamplingParams
from shards.logits_processors import TokenHistory, process
from tests.groups import ask, running_group
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
    history = TokenHistory(PROMPT, emitted)
    out = process(logits, SamplingParams(max_tokens=9, **fields), history, unused)
    assert (logits == before).all(), "the raw logits give the log-probabilities"
    return out


def transformers(processor: Any, logits: NDArray[np.float32]) -> NDArray[np.float32]:
    ids = torch.tensor([[*PROMPT, *EMITTED]])
    result: NDArray[np.float32] = processor(ids, torch.tensor(logits)[None].clone())[0].numpy()
    return result


def test_nothing_asked_nothing_copied() -> None:
    logits = row()
    assert processed(logits) is logits


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
    assert grown.counts == {}
    for token_id in EMITTED:
        grown.append(token_id)
    assert grown.counts == Counter(EMITTED)
    assert grown.last == EMITTED[-1]


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
